#!/usr/bin/env bash
# The pictures and the table of docs/gallery.md, from the records below results/reference alone: no GPU, no model, no network.
#   docs/images/make.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

report() { # a study of results/reference, and what of it is made
    local study=$1
    shift
    python -m buddy config config.yaml "results/reference/$study/study.yaml" --out "$work/$study/study.json"
    cp -r "results/reference/$study/records" "$work/$study/"
    python -m buddy report --study "$work/$study" "$@"
}

report smollm2-study --figure route_ribbon --figure 4 --figure 9 --figure 10 --table likelihood
report epyc-2-cores --figure latency --figure savings
report smollm2-predictor --figure 12 --figure 13
python - "$work" << 'PYTHON'
"""Each picture in 64 colours, and the table between its marks in the gallery."""
import sys
from pathlib import Path

from PIL import Image

work, docs = Path(sys.argv[1]), Path("docs")
for picture in sorted(work.glob("*/figures/*.png")):
    few = Image.open(picture).convert("RGB").quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(docs / "images" / picture.name, optimize=True)
start, end = "<!-- likelihood -->\n", "<!-- end of likelihood -->\n"
gallery = (docs / "gallery.md").read_text()
before, rest = gallery.split(start)
after = rest.split(end)[1]
table = (work / "smollm2-study/tables/likelihood.md").read_text()
first = table[: table.index("**Likelihood variants.")]
(docs / "gallery.md").write_text(f"{before}{start}\n{first.rstrip()}\n\n{end}{after}")
PYTHON

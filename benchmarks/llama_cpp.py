"""An exported model in llama.cpp beside the same model in transformers: how far their next tokens lie apart.

    python benchmarks/llama_cpp.py OUT FILE --data results/demo/data/alpaca [--prompts 8]

OUT and FILE are what `buddy export --out OUT --gguf FILE` wrote. Both read the same tokens; compared are the probabilities
of the token after each prompt, over the whole vocabulary (which llama.cpp is slow to tell: some seconds a prompt).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import xllamacpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from buddy.evaluation import traces


@torch.no_grad()
def main() -> None:
    """Print the divergence, and how often both would say the same."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=8)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    server = serve(options.file)
    size = model.config.vocab_size
    distances, same, same_tokens = [], 0, 0
    texts = traces.prompts(options.data)[: options.prompts]
    for text in texts:
        ids = tokenizer(text).input_ids
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        found = next_token(server, ids, size)
        distances.append((expected.exp() * (expected - found)).sum().item())
        same += int(expected.argmax() == found.argmax())
        same_tokens += int(counted(server, text) == len(ids))
    print(f"{options.file.name}, {len(texts)} prompts:")
    print(
        f"  KL(transformers, llama.cpp) of the next token: mean {sum(distances) / len(distances):.2g} nats, most {max(distances):.2g}"
    )
    print(f"  the same most probable token: {same} of {len(texts)}; as many tokens in the prompt: {same_tokens}")


def serve(file: Path) -> xllamacpp.Server:
    """llama.cpp over a file, on the CPU."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 2048, 1, 0, -1
    return xllamacpp.Server(params)


def asked(server: xllamacpp.Server, question: dict) -> dict:
    """The answer to a completion, in llama.cpp's own form."""
    answer = server.handle_completions({**question, "n_predict": 1, "verbose": True, "cache_prompt": False})
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    return answer.get("__verbose", answer)


def next_token(server: xllamacpp.Server, ids: list[int], size: int) -> torch.Tensor:
    """Log-probabilities of the next token, shape (V,). An answer that ends the text has none: another seed has."""
    answers = (asked(server, {"prompt": ids, "n_probs": size, "temperature": 1.5, "seed": seed}) for seed in range(50))
    answer = next(one for one in answers if one.get("completion_probabilities"))
    found = answer["completion_probabilities"][0]["top_logprobs"]
    return torch.tensor([entry["logprob"] for entry in sorted(found, key=lambda entry: entry["id"])]).log_softmax(-1)


def counted(server: xllamacpp.Server, text: str) -> int:
    """How many tokens llama.cpp cuts a text into."""
    return asked(server, {"prompt": text})["tokens_evaluated"]


if __name__ == "__main__":
    main()

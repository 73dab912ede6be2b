"""Runs vLLM on a folder: ``python vllm_worker.py FOLDER TOKENS.json OUT.json``; it needs vLLM and nothing of ``qat``.

``OUT.json``: ``logprobs`` of the whole vocabulary at every token but the last, the ``greedy`` tokens after the first 8,
and the ``kernels`` of the linear layers by name.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main(folder: str, given: str, out: str) -> None:
    from vllm import LLM, SamplingParams

    with open(given) as file:
        tokens = json.load(file)
    with open(os.path.join(folder, "config.json")) as file:
        settings = json.load(file)
    size = settings["vocab_size"]
    engine = LLM(folder, dtype=settings["dtype"], enforce_eager=True, max_model_len=64, max_num_seqs=2,
                 max_logprobs=size, seed=0, enable_prefix_caching=False, kv_cache_memory_bytes=64 << 20)
    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
    kernels = {name: type(getattr(module.scheme, "kernel", None)).__name__
               for name, module in model.named_modules() if hasattr(module, "scheme")}
    after = engine.generate([{"prompt_token_ids": tokens[:8]}],
                            SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0]
    whole = engine.generate([{"prompt_token_ids": tokens}],
                            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=size, ignore_eos=True))[0]
    rows = [[row[token].logprob for token in range(size)] for row in whole.prompt_logprobs[1:]]
    with open(out, "w") as file:
        json.dump({"logprobs": rows, "greedy": list(after.outputs[0].token_ids), "kernels": kernels}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

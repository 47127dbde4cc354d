"""One model in vLLM, in a process of its own: vllm_worker.py FOLDER IDS.json OUT.json [trust]."""

import json
import math
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def main(folder: str, ids_file: str, out: str, *trust: str) -> None:
    from vllm import LLM, SamplingParams

    ids = json.loads(Path(ids_file).read_text())
    engine = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=2,
        trust_remote_code=bool(trust),
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=0)
    done = engine.generate([{"prompt_token_ids": ids}], sampling)[0]
    log_probs = [
        each[token].logprob for token, each in zip(ids[1:], done.prompt_logprobs[1:], strict=True)
    ]
    found = {
        "perplexity": math.exp(-sum(log_probs) / len(log_probs)),
        "greedy": list(done.outputs[0].token_ids),
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What vLLM writes, run by its own Python: `vllm_generate.py DIR PROMPTS NUM_TOKENS OPTIONS FILE`.

PROMPTS (lists of ids) and OPTIONS are JSON. The file gets for each prompt pairs of a token, the likeliest,
and its log probability.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    directory, prompts, num_tokens, options, output = sys.argv[1:]
    llm = LLM(directory, skip_tokenizer_init=True, max_model_len=128, **json.loads(options))
    params = SamplingParams(
        max_tokens=int(num_tokens), temperature=0, logprobs=1, ignore_eos=True, detokenize=False
    )
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in json.loads(prompts)], params)
    written = [
        [(token, of_all[token].logprob) for token, of_all in zip(it.token_ids, it.logprobs, strict=True)]
        for it in (answer.outputs[0] for answer in answers)
    ]
    Path(output).write_text(json.dumps(written))

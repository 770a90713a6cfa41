"""vLLM with the plugin, as a person starts it: `make vllm-test`, some minutes a test.

vLLM lies in an environment of its own, and finds the plugin by itself in each of its processes. What it
writes is held against transformers' layers around our linears, given the same tokens: vLLM adds in another
order, so that now and then an input is rounded to the next INT8 number.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import gossamer
from gossamer.gpu.linear import SparseLinear
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize

ROOT = Path(__file__).parents[2]
VLLM = ROOT / ".vllm" / "bin" / "python"
MODEL = Path(gossamer.__file__).parent / "models" / "python-llama"
ROWS = {"dataset": ("python:stdlib",), "num_calibration_samples": 16, "max_seq_length": 128}
IGNORED = "model.layers.0.mlp.down_proj"
TEXTS = ('>>> sorted("bca")\n', "import os\nimport ", "class Point:\n    def __init__(self, x, y):\n")
NUM_TOKENS = 32
NEARLY_AS_LIKELY = 0.15  # a token of which vLLM's logit may be the larger one
MEAN_ERROR = 0.02  # of log probabilities; 0.005 to 0.011 was seen

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package's small model: sparse (70% zeros), and of that w8a8, one linear left out."""
    folder = tmp_path_factory.mktemp("models")
    prune(Prune(str(MODEL), str(folder / "sparse"), sparsity=0.7, method="sparsegpt", **ROWS))
    quantize(Quantize(str(folder / "sparse"), str(folder / "w8a8"), ignore=(IGNORED,), **ROWS))
    return folder


class Shared(nn.Module):
    """A linear as GPUs compute it that have some of its inputs each, and round those by themselves."""

    def __init__(self, w_NK: Tensor, scales_N: Tensor | None, num_gpus: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            SparseLinear.from_weight(it, scales_N) for it in w_NK.chunk(num_gpus, dim=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.chunk(len(self.parts), dim=-1)
        return sum(part(piece) for part, piece in zip(self.parts, pieces, strict=True))


def around_our_linears(directory: Path, dtype: torch.dtype, num_gpus: int) -> LlamaForCausalLM:
    """transformers' model with our linears in its layers, but for those that W8A8 leaves in floats."""
    config = LlamaConfig.from_pretrained(directory)
    is_int8 = vars(config).pop("quantization_config", None) is not None
    model, tensors = LlamaForCausalLM(config).to(dtype).eval(), load_file(directory / "model.safetensors")
    for name in [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]:
        scale_N1 = tensors.pop(f"{name}.weight_scale", None)
        if scale_N1 is not None or not is_int8:
            num = num_gpus if name.endswith(("o_proj", "down_proj")) else 1
            scales_N = None if scale_N1 is None else scale_N1.flatten()
            model.set_submodule(name, Shared(tensors.pop(f"{name}.weight"), scales_N, num))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all(".parts." in name or name == "lm_head.weight" for name in missing)
    return model


def written(directory: Path, options: dict[str, Any], folder: Path) -> tuple[list[list[int]], Tensor, str]:
    """Prompts with what vLLM wrote after them, its log probabilities, and its log."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    output = folder / "written.json"
    command = [
        VLLM,
        Path(__file__).with_name("vllm_generate.py"),
        directory,
        json.dumps(prompts),
        str(NUM_TOKENS),
    ]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    ran = subprocess.run(
        [*command, json.dumps(options), output], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
    answers = json.loads(output.read_text())
    texts = [[*prompt, *(token for token, _ in it)] for prompt, it in zip(prompts, answers, strict=True)]
    return texts, torch.tensor([[score for _, score in it] for it in answers]), ran.stdout + ran.stderr


EAGER = {"enforce_eager": True}
CASES = {
    "W8A8, eager": ("w8a8", {"dtype": "float32", **EAGER}, 15),
    "W8A8, compiled": ("w8a8", {"dtype": "float32"}, 15),
    "W8A8, on two": ("w8a8", {"dtype": "float32", "tensor_parallel_size": 2, **EAGER}, 15),
    "bfloat16, eager": ("sparse", {"dtype": "bfloat16", **EAGER}, 16),
    "bfloat16, compiled": ("sparse", {"dtype": "bfloat16"}, 16),
}


@pytest.mark.parametrize(("name", "options", "num_linears"), CASES.values(), ids=CASES)
def test_vllm_writes_what_our_linears_foretell(
    models: Path, name: str, options: dict[str, Any], num_linears: int, tmp_path: Path
) -> None:
    texts, scores_PT, log = written(models / name, {"quantization": "gossamer", **options}, tmp_path)
    num_gpus = options.get("tensor_parallel_size", 1)
    assert log.count(f"Packed {num_linears} linears") == num_gpus
    assert ("Warming up model for the compilation" in log) != options.get("enforce_eager", False)
    model = around_our_linears(models / name, getattr(torch, options["dtype"]), num_gpus)
    errors_PT = torch.zeros_like(scores_PT)
    for index, text in enumerate(texts):
        with torch.no_grad():
            logits_TV = model(torch.tensor([text])).logits[0, -1 - NUM_TOKENS : -1].float()
        chosen_T1 = torch.tensor(text[-NUM_TOKENS:])[:, None]
        lack_T1 = logits_TV.amax(dim=1, keepdim=True) - logits_TV.gather(1, chosen_T1)
        assert lack_T1.max() < NEARLY_AS_LIKELY
        errors_PT[index] = (logits_TV.log_softmax(dim=1).gather(1, chosen_T1)[:, 0] - scores_PT[index]).abs()
    print(f"{name} {options}: mean error of log probabilities {errors_PT.mean():.4f}")
    assert errors_PT.mean() < MEAN_ERROR


def test_without_the_option_vllm_runs_the_directory_by_itself(models: Path, tmp_path: Path) -> None:
    """Nothing in it says that it is ours, and having us installed changes nothing."""
    _, _, log = written(models / "w8a8", {"dtype": "bfloat16", **EAGER}, tmp_path)
    assert "Packed" not in log and "gossamer" not in log.replace(str(ROOT), "")

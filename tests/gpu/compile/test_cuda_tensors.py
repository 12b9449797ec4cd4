"""A model on "cuda" compiled with no option: fake tensors, the real Dynamo and backend, and what it would launch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from llmopt.compiled import alive
from llmopt.gpu import device
from llmopt.gpu.device import Gpu
from llmopt.gpu.executor import recording
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CUDA = torch.device("cuda:0")
H200 = Gpu("cuda", "90", "NVIDIA H200", 132, 232448)


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    """Fake tensors may be on cuda; their GPU is an H200."""
    if not torch.backends.cuda.is_built():
        compiler = shutil.which("g++")
        assert compiler is not None, "g++ is missing: the other tests need it, too"
        library = tmp_path_factory.mktemp("guard") / "guard.so"
        root = Path(torch.__file__).parent
        subprocess.run(
            [compiler, "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{root}/include", f"-L{root}/lib",
             str(Path(__file__).with_name("device_guard.cpp")), "-lc10", "-o", str(library)],
            check=True,
        )  # fmt: skip
        torch.ops.load_library(str(library))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "gpu_of", lambda d: H200 if d.type == "cuda" else None)
        yield


def on_cuda(tensor: torch.Tensor, mode: FakeTensorMode) -> FakeTensor:
    return FakeTensor(mode, tensor.detach().to("meta"), CUDA)


def moved(model: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(on_cuda(p, mode), requires_grad=False)
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = on_cuda(b, mode)
    return model


def test_a_llama_on_cuda_is_planned_for_its_gpu(cuda):
    torch._dynamo.reset()
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=100,
        intermediate_size=96, num_hidden_layers=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).half().eval()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = moved(model, mode)
    ids = on_cuda(torch.zeros(1, 7, dtype=torch.int64), mode)
    run = torch.compile(model, backend="llmopt")
    with mode, torch.no_grad(), recording() as launches:
        out = run(input_ids=ids, use_cache=True)
        token = run(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
    assert out.logits.device == token.logits.device == CUDA
    assert out.past_key_values.layers[0].keys.device == CUDA
    plans = [g.plan for g in alive() if g.plan is not None][-2:]
    for plan in plans:
        assert (plan.target.tier, plan.target.name) == ("sm_90", "NVIDIA H200")
        assert len(plan.segments) == 1
        assert not [f for f in plan.fallbacks if "is on" in f.reason]
    names = [launch.kernel for launch in launches]
    assert names.count("rope.triton") == 4
    assert names.count("attention_decode.triton") >= 2

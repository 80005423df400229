"""GPUs that are too old for the kernels (V100, T4): native computes in float16, and every report says so.

No such GPU is needed: torch's answers about the GPU are replaced.
"""

import pytest
import torch

pytest.importorskip("triton", reason="without Triton every GPU is refused for another reason")

import fastbert
from fastbert import BertConfig, BertModel, functional, info
from fastbert.encoding.encoder import resolve_dtype
from fastbert.kernels import _device

CARD = torch.device("cuda", 0)
REASON = "the kernels need compute capability 8.0, and this card has 7.5"


@pytest.fixture
def capability(monkeypatch):
    """Sets the compute capability of every CUDA device, and whether torch is built for AMD."""

    def answer(major: int, minor: int, hip: str | None = None) -> None:
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(_device, "capability", lambda index=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    return answer


@pytest.mark.parametrize(
    ("given", "impl", "dtype"),
    [
        ((6, 1), "native", torch.float32),  # GTX 1080: float16 at 1/64 of the rate of float32
        ((7, 0), "native", torch.float16),  # V100
        ((7, 5), "native", torch.float16),  # T4
        ((8, 0), "triton", torch.bfloat16),
        ((8, 6), "triton", torch.bfloat16),
        ((9, 0), "triton", torch.bfloat16),
        ((12, 1), "triton", torch.bfloat16),
        ((9, 4, "6.4"), "triton", torch.bfloat16),  # MI300: gfx942
        ((7, 0, "6.4"), "triton", torch.bfloat16),  # for AMD, a number below 8.0 says nothing about matrix units
    ],
)
def test_implementation_and_dtype(given, impl, dtype, capability):
    capability(*given)
    assert functional.choose_impl(None, CARD) == impl
    assert resolve_dtype("auto", CARD) == dtype
    assert resolve_dtype("bfloat16", CARD) == torch.bfloat16, "an explicit dtype stays"
    assert (functional.why_not_triton(CARD) is None) == (impl == "triton")


def test_triton_is_refused_by_name(capability):
    capability(7, 5)
    assert functional.why_not_triton(CARD) == REASON
    with pytest.raises(RuntimeError, match=f'impl="triton" cannot run here: {REASON}'):
        functional.choose_impl("triton", CARD)
    with fastbert.batch_invariant(), pytest.raises(RuntimeError, match=rf'got "native" on cuda \({REASON}\)'):
        functional.choose_impl(None, CARD)


def test_info_says_so(capability, monkeypatch):
    capability(7, 5)
    monkeypatch.setattr("fastbert.encoding.encoder.resolve_device", lambda device: CARD)
    lines = info._operators()
    assert lines[0] == "operators on cuda:0, in float16 by default"
    assert len([line for line in lines if REASON in line and " native " in line]) == len(functional.TRITON_MODULES)


def test_explain_says_so(monkeypatch):
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    fastbert.accelerate(model)

    def answer(reason: str | None) -> None:
        for place in ("functional", "functional._choice"):
            monkeypatch.setattr(f"fastbert.{place}.why_not_triton", lambda device: reason)

    answer(None)
    assert "impl=triton;" in str(fastbert.explain(model))
    answer(REASON)
    assert f"impl=native ({REASON});" in str(fastbert.explain(model))
    fastbert.accelerate(model, impl="native")
    assert "impl=native;" in str(fastbert.explain(model)), "asked for"


@pytest.mark.parametrize("given", [(7, 5), (9, 0)])
def test_asking_for_the_capability_does_not_break_a_graph(given, monkeypatch):
    """Every operator asks, also under torch.compile: there is one graph, whatever the answer."""
    torch._dynamo.reset()

    def ask(index=None):
        torch._dynamo.graph_break()  # torch's own query of the driver cannot be traced either
        return given

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_device, "capability", ask)

    def f(x):
        return x * 2 if functional.choose_impl(None, CARD) == "native" else x * 3

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert compiled(torch.ones(())) == (2.0 if given < (8, 0) else 3.0)


def test_models_run_as_on_such_a_gpu(capability):
    """The path of such a GPU, run on a CPU: every operator of a model by native, in float16."""
    capability(7, 5)
    config = BertConfig(vocab_size=29, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    torch.manual_seed(0)
    model = BertModel(config, impl=functional.choose_impl(None, CARD)).to(resolve_dtype("auto", CARD)).eval()
    ids = torch.randint(29, (3, 7))
    with torch.no_grad():
        expected = model.float()(ids).last_hidden_state
        out = model.half()(ids).last_hidden_state
    assert out.dtype == torch.float16
    assert (out.float() - expected).norm() < 5e-3 * expected.norm()

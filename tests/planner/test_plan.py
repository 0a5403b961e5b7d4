"""The planner's arithmetic, its training step, and its command line."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from microadam_jax import memory_report, microadam
from microadam_jax.__main__ import main
from microadam_jax.memory import GIB
from microadam_jax.models import model_shapes
from microadam_jax.optimizer_names import optimizer
from microadam_jax.planner import (
    CompiledPlan,
    arithmetic_plan,
    command,
    compiled_plan,
    parse_mesh,
    stacked_model,
)
from microadam_jax.planner.compiled import needed_and_available
from microadam_jax.planner.llama import loss, pieces

PLAN = ["plan", "--model", "llama-60m"]


def test_one_device_holds_what_the_memory_report_counts() -> None:
    model = stacked_model("llama-60m")
    plan = arithmetic_plan(model, microadam(1e-3), parse_mesh(""))
    assert plan.parameters == plan.gradients == 4 * model.parameters
    assert plan.state == memory_report(microadam(1e-3), model.params).total


def test_a_mesh_divides_kernels_and_leaves_norms_whole() -> None:
    model = stacked_model("llama-60m", "bfloat16")
    norms = (2 * 8 + 1) * 512
    plan = arithmetic_plan(model, optax.adam(1e-3), parse_mesh("fsdp=4,tp=2"))
    assert plan.parameters == 2 * ((model.parameters - norms) / 8 + norms)
    assert plan.state == 2 * plan.parameters + 4
    replicated = arithmetic_plan(model, optax.adam(1e-3), parse_mesh("data=8"))
    assert replicated.parameters == 2 * model.parameters


def test_llama2_70b_has_eight_key_heads() -> None:
    layers = stacked_model("llama2-70b").params["layers"]
    assert layers["self_attn"]["k_proj"]["kernel"].shape == (80, 8192, 1024)


def test_the_step_starts_at_the_loss_of_a_guess() -> None:
    """It differentiates, and shares key heads as Llama 2 70B does."""
    mesh = jax.make_mesh(
        (1, 2, 2),
        ("data", "fsdp", "tp"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:4],
    )
    random = np.random.default_rng(0)

    def draw(*shape: int) -> dict[str, jax.Array]:
        return {"kernel": jnp.asarray(0.02 * random.standard_normal(shape), jnp.float32)}

    norm = {"scale": jnp.ones((2, 128))}
    params = {
        "embed_tokens": {"embedding": draw(64, 128)["kernel"]},
        "layers": {
            "input_layernorm": norm,
            "self_attn": {
                "q_proj": draw(2, 128, 128),
                "k_proj": draw(2, 128, 64),
                "v_proj": draw(2, 128, 64),
                "o_proj": draw(2, 128, 128),
            },
            "post_attention_layernorm": norm,
            "mlp": {
                "gate_proj": draw(2, 128, 192),
                "up_proj": draw(2, 128, 192),
                "down_proj": draw(2, 192, 128),
            },
        },
        "norm": {"scale": jnp.ones(128)},
        "lm_head": draw(128, 64),
    }
    tokens = jnp.asarray(random.integers(64, size=(2, 16)), jnp.int32)
    value, gradients = jax.jit(jax.value_and_grad(lambda p: loss(p, tokens, mesh)))(params)
    assert value == pytest.approx(np.log(64), rel=0.05)
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(gradients))
    # In pieces, whose head goes through its vocabulary in chunks if tp does not cut it.
    whole = Mesh(np.reshape(jax.devices()[:1], (1, 1, 1)), mesh.axis_names)
    own = pieces(whole)

    def in_pieces(params: Any) -> jax.Array:
        x = own.before(params, tokens)
        for i in range(2):
            x = own.layer(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]), x)
        return own.after(params, x, tokens)

    again, others = jax.jit(jax.value_and_grad(in_pieces))(params)
    assert again == pytest.approx(float(value), rel=1e-3)
    one, other = (leaf["lm_head"]["kernel"] for leaf in (gradients, others))
    np.testing.assert_allclose(one, other, atol=0.02 * float(jnp.abs(one).max()))


def test_the_table_says_what_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    flags = ["--optimizer", "adamw,microadam:layout=pretrain", "--memory-per-device", "0.6"]
    main([*PLAN, *flags, "--chart", str(chart)])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["adamw"][-2:] == [f"{16 * 58_073_600 / GIB:.2f}", "no"]
    assert rows["microadam:layout=pretrain"][-1] == "yes"
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["muon", "prodigy", "lion"])
def test_optimizers_of_optax_and_its_contrib_are_found(name: str) -> None:
    state = optimizer(name).init({"w": jnp.zeros((4, 4))})
    assert jax.tree.leaves(state)


def test_layers_updated_in_the_backward_pass_leave_one_gradient(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = ["--optimizer", "adam_mini4bit", "--param-dtype", "bfloat16"]
    main([*PLAN, *whole, "--rounding", "compensated", "--update-in-backward"])
    output = capsys.readouterr().out
    assert "58,073,600 parameters in bfloat16, rounded compensated" in output
    gradients, state = output.splitlines()[-2].split()[2:4]
    # The head and the embedding are larger than a layer.
    assert gradients == f"{2 * 32000 * 512 / GIB:.2f}"
    main([*PLAN, *whole])
    all_gradients, less = capsys.readouterr().out.splitlines()[-2].split()[2:4]
    assert all_gradients == f"{2 * 58_073_600 / GIB:.2f}"
    assert float(state) - float(less) == pytest.approx(58_073_600 / GIB, abs=0.01)


def test_remat_is_for_the_compiled_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves what it does to the step to tests/targets, which have a compiler."""

    def compiled(model: Any, tx: Any, mesh: Any, *rest: Any, **options: Any) -> CompiledPlan:
        given.append(options["remat"])
        return CompiledPlan(arithmetic_plan(model, tx, mesh), GIB, 2 * GIB, None, {})

    given: list[bool] = []
    monkeypatch.setattr(command, "compiled_plan", compiled)
    for flags in ([], ["--remat", "layer"], ["--remat", "none"]):
        main([*PLAN, "--optimizer", "adamw", "--topology", "h200:1", *flags])
    assert given == [True, True, False]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compiled")]
    assert [line.partition("step, ")[2] for line in said] == [
        "each layer recomputed in the backward pass",
        "each layer recomputed in the backward pass",
        "all activations kept for the backward pass",
    ]


def test_optimizers_that_know_no_stacks_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Optax's Muon takes arrays of two axes alone as matrices."""
    main(["plan", "--model", "llama-60m", "--optimizer", "muon", "--optimizer", "muon4bit"])
    *_, last = capsys.readouterr().out.splitlines()
    apart = memory_report(optimizer("muon"), model_shapes("llama-60m")).total / GIB
    assert last.startswith("muon: layers are stacked here")
    assert last.endswith(f"it keeps {apart:.2f}.")


def test_a_mesh_that_does_not_divide_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    main([*PLAN, "--optimizer", "adamw", "--mesh", "fsdp=3"])
    assert "not cut: embed_tokens/embedding, layers/mlp/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rounding", "stochastic"], "--rounding stochastic needs --param-dtype bfloat16"),
        (["--model", "gpt2", "--update-in-backward"], "leave out --update-in-backward"),
        (["--optimizer", "sgd, mfac", "--update-in-backward"], "error: mfac: "),
        (["--optimizer", "adamw:b1"], "adamw:b1 must be NAME:OPTION=VALUE:..."),
        (["--optimizer", "adamw:b1=0.9:b1=0.8"], "with each option once"),
        (["--mesh", "rows=2"], "must be a list such as fsdp=64,tp=4"),
        (["--optimizer", "microadan"], "did you mean microadam"),
        (["--optimizer", "microadam:layers=2"], "microadam has no option 'layers'; it has b1,"),
        (["--model", "gpt2", "--mesh", "fsdp=2"], "take a Llama"),
        (["--mesh", "fsdp=2,fsdp=4"], "each once at most"),
        (["--mesh", "fsdp=99999999999"], "has 99,999,999,999 devices, too many"),
        (["--optimizer", "adafactor:min_dim_size_to_factor=x"], "error: adafactor:min_dim"),
        (["--optimizer", "lbfgs", "--update-in-backward"], "lbfgs: The optimizer cannot be"),
        (["--optimizer", "adam_mini:weight_decay=x"], "weight_decay must be a number"),
        (["--optimizer", "constant_schedule"], "no optimizer 'constant_schedule'"),
        (["--optimizer", "split_real_and_imaginary"], "no optimizer 'split_real"),
        (["--optimizer", "moun"], "did you mean muon"),
        (["--batch", "0"], "0 must be a positive whole number"),
        (["--memory-per-device", "-3"], "-3 must be a positive number"),
        (["--optimizer", "adamw", "--chart", "nowhere/chart.png"], "there is no directory nowhere"),
        (["--optimizer", "adamw", "--chart", "chart.txt"], "ends with .png, not chart.txt"),
        (["--optimizer", "adamw,,lion"], "An optimizer has no name"),
        (["--optimizer", "sgd,,"], "An optimizer has no name"),
        (["--optimizer", "schedule_free"], "There is no optimizer 'schedule_free'"),
        (["--optimizer", "adamw:b1=foo"], "adamw:b1 must be a number such as 0.9; got 'foo'"),
        (["--batch", "8"], "--batch 8 is of a compiled step, and needs --topology"),
        (["--optimizer", "sgd,adamw,sgd"], "--optimizer sgd,adamw,sgd has one of them twice"),
        (["--topology", "h200:12"], "up to 8 GPUs of one host, or a multiple of 8"),
    ],
)
def test_mistakes(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*PLAN, *flags])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("topology", "compiler", "package"),
    [("v5e:2x2", "libtpu", "libtpu"), ("h200:4", "jax_cuda13_plugin", r"jax\[cuda13\]")],
)
def test_without_the_compiler_the_error_says_what_to_install(
    topology: str, compiler: str, package: str
) -> None:
    if importlib.util.find_spec(compiler):
        pytest.skip(f"{compiler} is installed")
    with pytest.raises(ValueError, match=f"pip install {package}"):
        compiled_plan(
            stacked_model("llama-60m"),
            optimizer("adamw"),
            parse_mesh("fsdp=4"),
            topology,
            batch=8,
            seq=64,
        )


def test_a_compiler_that_gives_up_says_what_it_would_have_needed() -> None:
    """The first message is as libtpu gave it; any other error is not for want of memory."""
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (22.38G) exceeds available HBM (15.75G)."
    )
    assert needed_and_available(message) == (int(22.38 * GIB), int(15.75 * GIB))
    message = "Ran out of memory in memory space hbm. Used 1.5T of 512.0M hbm."
    assert needed_and_available(message) == (3 * 2**39, 2**29)
    assert needed_and_available("INTERNAL: something else") is None

"""The LoRA of a span: how it starts, how it is read and written by unit, and its versions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from blocks.adapters import (
    LIVE,
    MAX_VERSIONS,
    LoraSettings,
    add_version,
    all_unit_shapes,
    attach,
    drop_version,
    initial_tensor,
    layout_digest,
    parameters_by_unit,
    read_units,
    unit_digest,
    unit_shapes,
    use_version,
    versions,
    write_units,
)
from blocks.errors import BadAdapter
from blocks.export import export_adapter
from blocks.load import SpanModel, load_span
from blocks.source import ModelSource, find_model
from blocks.spans import Span, UnitId
from tests.errors_page import met
from tests.unit.blocks.conftest import CPU, save_tiny

SETTINGS = LoraSettings(rank=4, seed=11)
UNIT = UnitId("default/block.3")
HIDDEN_BTD = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 64)


@pytest.fixture
def attached(llama_span: SpanModel) -> SpanModel:
    attach(llama_span, SETTINGS)
    return llama_span


def shifted(model: SpanModel, by: float) -> dict[UnitId, dict[str, torch.Tensor]]:
    return {
        unit: {name: tensor + by for name, tensor in tensors.items()} for unit, tensors in read_units(model).items()
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "a/b"),
        ("name", ""),
        ("rank", 0),
        ("rank", 10**6),
        ("alpha", 0.0),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", math.nan),
        ("targets", ()),
        ("targets", ("q proj",)),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused_at_birth(field: str, value: object) -> None:
    with pytest.raises(BadAdapter, match=f"adapter.{field}"):
        LoraSettings(**({"seed": 1} | {field: value}))  # type: ignore[arg-type]


def test_units_start_equal_whatever_span_holds_them(llama_source: ModelSource) -> None:
    found = []
    for span, dtype in ((Span(0, 6), torch.float32), (Span(3, 4), torch.bfloat16)):
        torch.manual_seed(len(span))
        model = load_span(llama_source, span, dtype=dtype, device=CPU)
        attach(model, SETTINGS)
        found.append(read_units(model)[UNIT])
    assert unit_digest(found[0]) == unit_digest(found[1])
    assert all(tensor.dtype == torch.float32 for tensor in found[1].values())


def test_the_first_values_are_the_same_for_ever() -> None:
    tensor = initial_tensor(11, UNIT, "self_attn.q_proj.lora_A", (4, 64))
    assert unit_digest({"a": tensor}).hex().startswith("309abdbdc2865740")
    assert float(tensor.abs().max()) <= 1 / 8
    assert float(tensor.abs().max()) > 0.9 / 8
    assert not torch.equal(tensor, initial_tensor(12, UNIT, "self_attn.q_proj.lora_A", (4, 64)))
    assert not initial_tensor(11, UNIT, "self_attn.q_proj.lora_B", (64, 4)).any()


def test_attaching_draws_no_random_numbers_of_others(llama_span: SpanModel) -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    attach(llama_span, SETTINGS)
    add_version(llama_span, "round-1", read_units(llama_span))
    assert torch.equal(torch.rand(3), want)


def test_only_live_parameters_are_trained(attached: SpanModel) -> None:
    add_version(attached, "round-1", {})
    use_version(attached, "round-1")
    trained = {id(p) for named in parameters_by_unit(attached).values() for p in named.values()}
    assert {id(p) for p in attached.module.parameters() if p.requires_grad} == trained


def test_units_come_sorted_and_as_copies(attached: SpanModel) -> None:
    units = read_units(attached)
    assert list(units) == [f"default/block.{number}" for number in (2, 3, 4)]
    assert list(units[UNIT]) == sorted(units[UNIT]) == sorted(unit_shapes(attached)[UNIT])
    units[UNIT]["self_attn.q_proj.lora_A"].fill_(9.0)
    assert not (read_units(attached)[UNIT]["self_attn.q_proj.lora_A"] == 9.0).any()


def test_what_was_written_is_read(attached: SpanModel) -> None:
    wanted = shifted(attached, 0.5)
    write_units(attached, wanted)
    for unit, tensors in read_units(attached).items():
        assert unit_digest(tensors) == unit_digest(wanted[unit])


@pytest.mark.parametrize("fault", ["unit", "name", "missing", "shape", "nan", "integer"])
def test_units_that_do_not_fit_change_nothing(attached: SpanModel, fault: str) -> None:
    before = {unit: unit_digest(tensors) for unit, tensors in read_units(attached).items()}
    units = {unit: dict(tensors) for unit, tensors in shifted(attached, 1.0).items()}
    last = units[UnitId("default/block.4")]
    name = "self_attn.q_proj.lora_A"
    match fault:
        case "unit":
            units[UnitId("default/block.5")] = last
        case "name":
            last["evil"] = last.pop(name)
        case "missing":
            del last[name]
        case "shape":
            last[name] = last[name].T
        case "nan":
            last[name][0, 0] = math.nan
        case "integer":
            last[name] = torch.zeros(last[name].shape, dtype=torch.int64)
    with pytest.raises(BadAdapter):
        write_units(attached, units)
    assert {unit: unit_digest(tensors) for unit, tensors in read_units(attached).items()} == before


def test_versions_compute_what_they_hold_and_switch_back(attached: SpanModel) -> None:
    live = attached.forward(HIDDEN_BTD, span=Span(2, 5))
    add_version(attached, "round-1", shifted(attached, 0.1))
    add_version(attached, "round-2", shifted(attached, 0.2))
    outputs = {}
    for label in ("round-1", "round-2", LIVE, "round-1"):
        use_version(attached, label)
        outputs.setdefault(label, attached.forward(HIDDEN_BTD, span=Span(2, 5)))
        assert torch.equal(outputs[label], attached.forward(HIDDEN_BTD, span=Span(2, 5)))
    assert torch.equal(outputs[LIVE], live)
    assert not torch.equal(outputs["round-1"], outputs["round-2"])
    write_units(attached, read_units(attached, "round-2"))
    use_version(attached, LIVE)
    assert torch.equal(attached.forward(HIDDEN_BTD, span=Span(2, 5)), outputs["round-2"])


def test_a_version_that_adds_nothing_is_not_computed(attached: SpanModel) -> None:
    write_units(attached, shifted(attached, 0.1))
    zeros = {u: {name: torch.zeros_like(t) for name, t in named.items()} for u, named in read_units(attached).items()}
    add_version(attached, "plain", zeros)
    add_version(attached, "other", {})

    def outputs() -> list[torch.Tensor]:
        found = []
        for label in ("plain", "other"):
            use_version(attached, label)
            with torch.no_grad():
                found.append(attached.forward(HIDDEN_BTD, span=Span(2, 5)))
        return found

    before = outputs()
    attached.empty_versions.clear()
    computed = outputs()
    assert all(torch.equal(one, other) for one, other in zip(computed, before, strict=True))
    attached.empty_versions.add("plain")
    use_version(attached, LIVE)
    for label in ("plain", "other"):
        for named in parameters_by_unit(attached, label).values():
            for name, parameter in named.items():
                if name.endswith("lora_A"):
                    parameter.data.fill_(torch.nan)  # whoever computes with it shows it
    plain, other = outputs()
    assert torch.equal(plain, before[0])
    assert torch.isfinite(before[1]).all()
    assert torch.isnan(other).any()
    attached.empty_versions.clear()
    assert torch.isnan(outputs()[0]).any()


def test_switching_versions_does_not_disturb_an_open_graph(attached: SpanModel) -> None:
    write_units(attached, shifted(attached, 0.1))
    parameters = [p for named in parameters_by_unit(attached).values() for p in named.values()]
    want = torch.autograd.grad(attached.forward(HIDDEN_BTD, span=Span(2, 5)).sum(), parameters)
    output_BTD = attached.forward(HIDDEN_BTD, span=Span(2, 5))
    add_version(attached, "round-1", {})
    use_version(attached, "round-1")
    attached.forward(HIDDEN_BTD, span=Span(2, 5))
    drop_version(attached, "round-1")
    got = torch.autograd.grad(output_BTD.sum(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_a_dropped_version_is_gone_and_live_is_on_again(attached: SpanModel) -> None:
    add_version(attached, "round-1", {})
    use_version(attached, "round-1")
    drop_version(attached, "round-1")
    assert versions(attached) == (LIVE,)
    assert attached.version == LIVE
    for label in ("round-1", "never", LIVE):
        with pytest.raises(BadAdapter):
            drop_version(attached, label)
    with pytest.raises(BadAdapter, match="round-1"):
        use_version(attached, "round-1")


@pytest.mark.parametrize("label", ["live", "", "a.b", "a/b", "x" * 81])
def test_a_label_that_cannot_be_one_is_refused(attached: SpanModel, label: str) -> None:
    with pytest.raises(BadAdapter, match="cannot name"):
        add_version(attached, label, {})


def test_a_version_that_does_not_fit_leaves_no_trace(attached: SpanModel) -> None:
    with pytest.raises(BadAdapter):
        add_version(attached, "round-1", {UnitId("default/block.5"): {}})
    assert versions(attached) == (LIVE,)
    add_version(attached, "round-1", {})
    with pytest.raises(BadAdapter, match="exists"):
        add_version(attached, "round-1", {})


def test_versions_are_bounded(attached: SpanModel) -> None:
    for number in range(MAX_VERSIONS):
        add_version(attached, f"v{number}", {})
    with pytest.raises(BadAdapter, match="in use"):
        add_version(attached, "one-more", {})


def test_a_second_adapter_or_none_is_refused(llama_span: SpanModel) -> None:
    with pytest.raises(BadAdapter, match="attach"):
        read_units(llama_span)
    attach(llama_span, SETTINGS)
    with pytest.raises(BadAdapter, match="already"):
        attach(llama_span, SETTINGS)


def test_targets_that_no_module_has_are_refused(llama_span: SpanModel) -> None:
    with pytest.raises(BadAdapter, match="nothing_like_it"):
        attach(llama_span, LoraSettings(seed=1, targets=("nothing_like_it",)))


def test_a_mistyped_target_beside_a_right_one_is_named(llama_source: ModelSource) -> None:
    with pytest.raises(BadAdapter, match=r"has 'v_prj', .* use some of down_proj, .*v_proj$") as caught:
        all_unit_shapes(LoraSettings(seed=1, targets=("q_proj", "v_prj")), llama_source)
    met("which no block of", caught.value)


def test_chosen_targets_are_taken(llama_span: SpanModel) -> None:
    attach(llama_span, LoraSettings(seed=1, targets=("mlp.up_proj", "o_proj")))
    names = {name.rpartition(".")[0] for name in read_units(llama_span)[UNIT]}
    assert names == {"mlp.up_proj", "self_attn.o_proj"}


def test_targets_inside_fused_experts_are_refused(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path)
    source = find_model(str(tmp_path), cache_dir=tmp_path)
    model = load_span(source, Span(1, 3), dtype=torch.float32, device=CPU)
    with pytest.raises(BadAdapter, match="experts"):
        attach(model, LoraSettings(seed=1, targets=("gate_proj",)))


def test_the_layout_is_the_same_for_all_who_agree_and_only_for_them(
    llama_source: ModelSource, attached: SpanModel
) -> None:
    shapes = all_unit_shapes(SETTINGS, llama_source)
    assert {unit: shapes[unit] for unit in unit_shapes(attached)} == unit_shapes(attached)
    assert len(shapes) == 6
    digests = {
        layout_digest(settings, llama_source)
        for settings in (
            SETTINGS,
            LoraSettings(rank=8, seed=11),
            LoraSettings(rank=4, seed=12),
            LoraSettings(rank=4, seed=11, alpha=8.0),
            LoraSettings(rank=4, seed=11, name="other"),
            LoraSettings(rank=4, seed=11, targets=("q_proj",)),
        )
    }
    assert len(digests) == 6
    assert layout_digest(LoraSettings(rank=4, seed=11), llama_source) in digests


def test_an_export_without_all_units_is_refused(attached: SpanModel, tmp_path: Path) -> None:
    with pytest.raises(BadAdapter, match="3 units"):
        export_adapter(read_units(attached), SETTINGS, attached.source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_an_adapter_but_nothing_else(llama_source: ModelSource, tmp_path: Path) -> None:
    model = load_span(llama_source, Span(0, 6), dtype=torch.float32, device=CPU)
    attach(model, SETTINGS)
    for _ in range(2):
        export_adapter(read_units(model), SETTINGS, llama_source, tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"out"}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    refused: dict[str, BadAdapter] = {}
    (tmp_path / "out" / "checkpoint-500").mkdir()  # as a Trainer's output directory has them
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("thesis", "out", "thesis/chapter", "link/out"):
        with pytest.raises(BadAdapter) as caught:
            export_adapter(read_units(model), SETTINGS, llama_source, tmp_path / name)
        refused[name] = caught.value
    met("holds no adapter; name another", refused["thesis"])
    met("holds more than an adapter", refused["out"])
    met("cannot take an adapter", refused["thesis/chapter"])
    met("cannot write the adapter to", refused["link/out"])
    assert (tmp_path / "thesis" / "chapter").read_text() == "one"
    assert (tmp_path / "out" / "checkpoint-500").is_dir()

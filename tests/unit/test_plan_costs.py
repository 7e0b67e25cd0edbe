"""What a plan counts, against models that are built, passes that are counted and formulas written out; no network."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from command_line import buddy
from models import ARCHITECTURES, tiny
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from buddy.errors import UserError
from buddy.study import config, costs, devices, planning, results, shapes, texts
from buddy.study.costs import Passes, Sizes
from buddy.study.devices import DEVICES, Device
from buddy.study.estimates import SHORTEST, Estimates
from buddy.study.jobs import Job, Jobs, closure

ROOT = Path(__file__).resolve().parents[2]
PAPER = config.read(ROOT / "config.yaml")
H100 = DEVICES["h100"]


def estimates(study=PAPER, folder=Path("nowhere"), device: Device = H100) -> Estimates:
    return Estimates(Jobs(study), folder, device, lambda: results.of_study(Jobs(study)))


def job_of(found: Estimates, stage: str, holds: str = "") -> Job:
    return next(job for job in results.of_study(found.jobs) if job.stage == stage and holds in job.name)


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3.0-8b", 8_030_261_248),
        ("llama2-7b", 6_738_415_616),
        ("llama1-13b", 13_015_864_320),
        ("qwen2.5-7b", 7_615_616_512),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_backbones_have_their_published_numbers_of_parameters(name: str, parameters: int) -> None:
    found = estimates().shape(name)
    assert (found.parameters, found.known) == (parameters, True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_shape_has_the_parameters_of_the_model(architecture: str, kv_heads: int) -> None:
    model = tiny(architecture, blocks=5, kv_heads=kv_heads)
    found = shapes.of_config(model.config.to_dict())
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    layer = model.get_decoder().layers[0]
    assert found.block == sum(parameter.numel() for parameter in layer.parameters())


def test_a_fetched_backbone_says_its_own_shape(tmp_path: Path) -> None:
    tiny(blocks=7).config.save_pretrained(tmp_path / "backbones/llama3-8b")
    assert Estimates(Jobs(PAPER), tmp_path, H100).shape("llama3-8b").hidden == 32


def test_of_an_unknown_repository_parameters_may_be_said() -> None:
    content = PAPER.model_dump(mode="json")
    content["backbones"]["llama3-8b"]["source"] = {"hub": "somebody/model"}
    guess = estimates(config.parse(content)).shape("llama3-8b")
    assert not guess.known
    content["backbones"]["llama3-8b"]["parameters"] = 3.0
    said = estimates(config.parse(content)).shape("llama3-8b")
    assert said.known
    assert said.parameters == pytest.approx(3e9, rel=0.15)


# ---- operations and bytes --------------------------------------------------------------------------------------------


def wide(blocks: int = 6) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=blocks, num_key_value_heads=2)).to(torch.bfloat16)


def sizes_of(model: LlamaForCausalLM) -> Sizes:
    return Sizes(shapes.of_config(model.config.to_dict()), texts.PUBLISHED.__getitem__)


def test_operations_of_a_pass_and_of_a_training_step_are_those_that_torch_counts() -> None:
    model, ids = wide(), torch.randint(0, 512, (4, 64))
    on = sizes_of(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    # Torch's causal attention counts all pairs or half of them, by its kernel: a few percent here.
    assert on.forward(4, 64, 4).flops == pytest.approx(counter.get_total_flops(), rel=0.04)
    model.requires_grad_(False)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with FlopCounterMode(display=False) as counter:
        lora(ids, labels=ids).loss.backward()
    # Forth, and back for the activations alone: 4 N D, where a whole training has 6 N D.
    assert on.forward(4, 64, 4).times(2).flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_memory_of_what_learns_is_that_of_lora_its_gradients_and_adam() -> None:
    model = wide()
    on = sizes_of(model)
    model.requires_grad_(False)
    lora = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    learnt = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    assert on.shape.lora(8) == sum(parameter.numel() for parameter in learnt)
    optimizer = torch.optim.AdamW(learnt)
    lora(torch.randint(0, 512, (1, 8)), labels=torch.randint(0, 512, (1, 8))).loss.backward()
    optimizer.step()
    held = sum(parameter.nbytes + parameter.grad.nbytes for parameter in learnt if parameter.grad is not None)
    held += sum(
        value.nbytes for state in optimizer.state.values() for name, value in state.items() if name.startswith("exp")
    )
    assert 16 * on.shape.lora(8) == held


@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_are_those_that_autograd_keeps(checkpointed: bool) -> None:
    model = wide()
    on = sizes_of(model)
    model.requires_grad_(False)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    if checkpointed:
        lora.gradient_checkpointing_enable({"use_reentrant": False})
        lora.enable_input_require_grads()
    weights = {parameter.untyped_storage().data_ptr() for parameter in lora.parameters()}
    kept: dict[int, int] = {}

    def note(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    ids = torch.randint(0, 512, (4, 64))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        states = lora.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    assert states.requires_grad
    counted = on.activations(ids.numel(), 1.0, checkpointed)
    if checkpointed:  # one block at a time is there besides, on the way back
        counted -= on.activations(ids.numel(), 1 / 6, False)
        assert counted <= sum(kept.values()) <= counted + 3 * 2 * 256 * ids.numel()
    else:
        assert counted == pytest.approx(sum(kept.values()), rel=0.05)


def test_decoding_is_bound_by_weights_read_or_by_launches() -> None:
    shape = estimates().shape("llama2-7b")
    on = Sizes(shape, texts.PUBLISHED.__getitem__)
    _, step = on.decode(1, 0, 100, 1)
    weights = 2 * (shape.parameters - shape.vocab * shape.hidden - shape.hidden)  # the input embedding is looked up
    assert step.weights * 2 == pytest.approx(100 * weights, rel=1e-3)
    # The paper's Table 4 on an A100: 39.48 tokens/s, launch by launch.
    assert 100 / step.seconds(DEVICES["a100"]) == pytest.approx(39.48, rel=0.05)
    captured = Passes(step.flops, step.weights, step.cache, 0.0)
    assert captured.seconds(DEVICES["a100"]) == pytest.approx(100 * weights / (0.7 * 2039e9), rel=0.05)


# ---- jobs ------------------------------------------------------------------------------------------------------------


def test_a_training_is_4_n_d_written_out() -> None:
    found = estimates()
    job = job_of(found, "adapt", "llama3-8b/method~dense_lora")
    # Alpaca's 51,760 examples of some 190 tokens, twice, padded; every weight but the input embedding takes part, the
    # output embedding for responses alone.
    blocks, head = 8.03e9 - 2 * 128256 * 4096, 128256 * 4096
    tokens = 2 * 51760 * 190 / costs.REAL
    attention = 2 * 32 * 4096 * 190 / costs.REAL
    operations = tokens * (4 * (blocks + head * 120 / 190) + 2 * attention)
    expected = operations / (0.3 * 989.4e12) + 16.06e9 / 1e9 + costs.START_S
    assert found.seconds(job) == pytest.approx(expected, rel=0.02)


def test_an_evaluation_is_its_tokens_through_the_blocks_that_run() -> None:
    found = estimates()
    whole = job_of(found, "evaluate", "backbone~llama3-8b/method~dense/")
    tokens = {"openbookqa": 500 * 4 * 18, "piqa": 1838 * 2 * 37, "boolq": 3270 * 2 * 141, "siqa": 1954 * 3 * 34}
    tokens |= {"hellaswag": 10042 * 4 * 80, "arc_easy": 2376 * 4 * 33, "arc_challenge": 1172 * 4 * 38}
    tokens |= {"winogrande": 1267 * 2 * 28}
    operations = 2 * (8.03e9 - 2 * 128256 * 4096) * sum(tokens.values())
    arithmetic = operations / (0.3 * 989.4e12)
    each = (18, 37, 141, 34, 80, 33, 38, 28)
    launches = sum(32 * 8e-4 * count / 16 / one for count, one in zip(tokens.values(), each, strict=True))
    demand = found.demand(whole)
    assert demand is not None
    work = found.seconds(whole) - costs.START_S - 16.06
    assert max(arithmetic, launches) < work < 1.05 * (arithmetic + launches)
    pruned = job_of(found, "evaluate", "backbone~llama3-8b/method~sleb/criterion~ppl/removed~16")
    assert (found.seconds(pruned) - costs.START_S - 16.06) == pytest.approx(work / 2, rel=0.05)


def test_memory_of_the_largest_jobs() -> None:
    def held(**more: object) -> float:
        study = config.parse(config.merge(PAPER.model_dump(mode="json"), more))
        found = estimates(study)
        demand = found.demand(job_of(found, "train", "llama1-13b"))
        assert demand is not None
        return demand.memory(H100) / 1e9

    # 26 GB of weights; batches of 8 x 512 tokens fit with checkpoints, and not without.
    plain = {"backbones": {"llama1-13b": {"gradient_checkpointing": False}}}
    assert 26 < held() < 60
    assert held(**plain) > 80
    assert held(**plain, training={"batch_size": 4}) < 80


@pytest.mark.parametrize("stage", ["train", "adapt", "calibrate", "importance"])
def test_arithmetic_is_near_what_reference_runs_took(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2 on two cores, other work beside it at times (two trainings of the same size took 690 and 2,832 s): of each
    stage the job that comes nearest to having had the machine for itself, of those that took over a minute."""
    monkeypatch.setattr(costs, "REAL", 0.46)  # of batches drawn at random, as they were
    folder = ROOT / "results/reference/smollm2-study"
    study = config.read(ROOT / "config.yaml", folder / "study.yaml")
    found = Estimates(Jobs(study), folder, DEVICES["cpu"])
    ratios = []
    for job in results.of_study(found.jobs):
        records = [folder / output for output in job.outputs if output.startswith("records/")]
        if job.stage == stage and all(path.is_file() for path in records):
            took = json.loads(records[0].read_text())["wall_s"]
            ratios += [took / found.seconds(job)] if took > 60 else []
    assert 0.5 < min(ratios) < 2.5


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_limits_are_a_multiple_of_the_time_and_rise_at_every_retry() -> None:
    found = estimates()
    job = job_of(found, "train", "llama2-7b")
    minutes = found.seconds(job) * PAPER.limits.safety / 60
    asked = [found.minutes(job, attempt) for attempt in (1, 2, 3)]
    assert minutes <= asked[0] < minutes + 1
    assert asked[1:] == [2 * asked[0], 3 * asked[0]]
    assert [found.minutes(job, attempt, at_most=asked[0] + 5) for attempt in (2, 3)] == [asked[0] + 5] * 2
    assert found.minutes(job, 1, at_most=20) == asked[0]  # the first try is refused, not cut short
    for one in results.of_study(found.jobs):
        assert found.minutes(one) >= SHORTEST
    memory = [found.host_mb(job, attempt) for attempt in (1, 2)]
    assert memory[1] == pytest.approx(1.5 * memory[0], abs=1)
    assert memory[0] == pytest.approx(6000 + 1.15 * 13477, rel=0.01)


def test_hours_and_memory_that_a_backbone_says_win() -> None:
    own = {"backbones": {"llama2-7b": {"hours": 2.5, "mem_gb": 48}}}
    found = estimates(config.parse(config.merge(PAPER.model_dump(mode="json"), own)))
    for stage in ("train", "evaluate"):
        job = job_of(found, stage, "llama2-7b")
        assert (found.minutes(job), found.host_mb(job)) == (150, 48_000)


def test_a_slower_device_takes_longer() -> None:
    taken = [estimates(device=DEVICES[name]) for name in ("h200", "h100", "a100", "cpu")]
    for stage in ("train", "evaluate", "solve"):
        seconds = [found.seconds(job_of(found, stage)) for found in taken]
        assert seconds == sorted(seconds)


def test_devices_are_known_by_what_drivers_call_them() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-PCIE-40GB": "a100-40gb",
        "cpu (AMD EPYC 7B13)": "cpu",
    }
    for name, expected in names.items():
        found = devices.named(name)
        assert found is not None
        assert found.name == expected
    assert devices.named("Tesla V100") is None
    with pytest.raises(UserError, match="did you mean h100"):
        devices.device("h10")


# ---- what ran says better --------------------------------------------------------------------------------------------


def ran(folder: Path, job: Job, seconds: float, device: str) -> None:
    """What a job leaves that took so long on a device."""
    for output in job.outputs:
        path = folder / output / "removed~0.json" if not Path(output).suffix else folder / output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": {"device": device}, "wall_s": seconds + 100}, indent=1))
    benchmark = folder / "benchmarks" / f"{job.place}.tsv"
    benchmark.parent.mkdir(parents=True, exist_ok=True)
    benchmark.write_text(f"s\th:m:s\n{seconds}\t0:00:00\n")


def test_jobs_that_ran_on_the_device_correct_the_arithmetic_of_their_stage(tmp_path: Path) -> None:
    plain, found = estimates(), estimates(folder=tmp_path)
    trained = [job for job in results.of_study(found.jobs) if job.stage == "train"][:3]
    counted = [plain.seconds(job) for job in trained]
    for job, seconds in zip(trained[:2], counted, strict=False):
        ran(tmp_path, job, 2 * seconds, "NVIDIA H100 80GB HBM3")
    ran(tmp_path, trained[2], 50 * counted[2], "NVIDIA A100-SXM4-80GB")
    assert found.corrections["train"].jobs == 2
    assert found.corrections["train"].factor == pytest.approx(2)
    last = [job for job in results.of_study(found.jobs) if job.stage == "train"][-1]
    assert found.seconds(last) == pytest.approx(2 * plain.seconds(last))
    other = job_of(found, "evaluate")
    assert found.seconds(other) == plain.seconds(other)


# ---- the plan --------------------------------------------------------------------------------------------------------


def weekend() -> config.Config:
    return config.read(ROOT / "config.yaml", ROOT / "workflow/weekend.yaml")


def test_what_is_done_is_not_planned(tmp_path: Path) -> None:
    jobs = Jobs(weekend(), "results/weekend")
    _, before = planning.read(jobs, tmp_path, "h100")
    done = [job for job in results.of_study(jobs) if job.stage in ("data", "backbone")]
    for job in done:
        ran(tmp_path, job, 1.0, "")
    _, after = planning.read(jobs, tmp_path, "h100")
    assert before.jobs - after.jobs == len(done)
    assert {row.stage: row.done for row in after.rows if row.done} == {"backbone": 1, "data": len(done) - 1}


def test_the_longest_chain_is_the_longest_of_all_paths() -> None:
    found, plan = planning.read(Jobs(weekend(), "results/weekend"), Path("nowhere"), "h100")
    graph = [job for row in plan.rows for job in row.jobs]

    def longest(job: Job) -> float:
        return found.seconds(job) + max((longest(needed) for needed in job.needs), default=0.0)

    assert sum(map(found.seconds, plan.chain)) == pytest.approx(max(map(longest, graph)))
    for one, following in itertools.pairwise(plan.chain):
        assert one in following.needs


def test_on_one_gpu_jobs_follow_each_other_and_on_many_the_longest_chain_counts() -> None:
    found, plan = planning.read(Jobs(weekend(), "results/weekend"), Path("nowhere"), "h100")
    chain = sum(map(found.seconds, plan.chain))
    alone, eight, many = (planning.makespan(found, plan, gpus) for gpus in (1, 8, 500))
    assert plan.gpu_seconds <= alone <= plan.gpu_seconds + 600  # what is fetched first, and the last table
    assert many == pytest.approx(chain)
    assert max(chain, plan.gpu_seconds / 8) <= eight <= plan.gpu_seconds / 8 + chain


def test_a_weekend_on_eight_gpus_gives_tables_2_and_4_of_one_backbone() -> None:
    study = weekend()
    assert {"table2", "table4"} <= set(study.measured_tables())
    found, plan = planning.read(Jobs(study, "results/weekend"), Path("nowhere"), "h100")
    assert plan.gpu_seconds / 3600 < 40
    assert planning.makespan(found, plan, 8) / 3600 < 48
    shown = {run.method for run in study.runs()}
    assert shown == {*PAPER.study.methods}


def test_targets_are_tables_figures_and_outputs(tmp_path: Path) -> None:
    jobs = Jobs(PAPER, "results/paper")
    run = PAPER.main_run("llama3-8b").path
    found = planning.wanted(jobs, [f"results/paper/runs/{run}/run.json"])
    assert found == closure([jobs("train", routed=run)])
    assert planning.wanted(jobs, ["table2", "all"]) == results.of_study(jobs)
    with pytest.raises(UserError, match="did you mean table2"):
        planning.wanted(jobs, ["tabel2"])


def test_it_is_printed_before_anything_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overlay = ("--configfile", "workflow/weekend.yaml", "--results", tmp_path)
    said = buddy("plan", "--device", "h100", "--gpus", 8, *overlay)
    assert said.status == 0, said.err
    lines = said.out.splitlines()
    stages = [line.split() for line in lines if line.strip().startswith(("adapt ", "train ", "all "))]
    assert [line[:2] for line in stages] == [["train", "1"], ["adapt", "21"], ["all", str(_jobs(weekend()))]]
    assert any(line.startswith("Longest chain") for line in lines)
    assert any(line.startswith("Largest job: train") and "of 80 GB" in line for line in lines)
    assert lines[-1].startswith("On 8 GPUs all is done after")
    assert not list(tmp_path.iterdir())
    assert "did you mean h100" in buddy("plan", "--device", "h10", *overlay).err
    assert "it does not fit" in buddy("plan", "--device", "rtx4090", *overlay).out


def _jobs(study: config.Config) -> int:
    return len(results.of_study(Jobs(study)))


def test_without_a_file_of_the_study_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = buddy("plan")
    assert said.status == 2
    assert "config.yaml" in said.err
    assert not os.listdir(tmp_path)

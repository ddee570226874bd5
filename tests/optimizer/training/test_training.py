from __future__ import annotations

import asyncio
import json
import math
import os
import signal

import pytest

from memory.adapters import digest_base, verify_adapter
from optimizer.config import DemonstrationConfig, PreferenceConfig
from optimizer.data.demonstrations import build_demonstrations
from optimizer.data.preferences import build_preferences
from optimizer.data.rows import write_rows
from optimizer.errors import TrainingError
from optimizer.training.child import share_of_rate
from optimizer.training.launch import child_environment, log_path, read_finished, train
from optimizer.training.spec import EarlyAdapter, TrainingSpec
from tests.optimizer.worlds import live

FOODS = ["carrot", "onion", "banana", "pork", "pepper", "salmon"]


def episodes(tokenizer):
    won = [
        live(
            [(f"cook {food} with stove", "Fried."), ("eat meal", "Won!")],
            tokenizer=tokenizer,
            task=food,
            text=f"fry the {food}",
        )
        for food in FOODS
    ]
    lost = [
        live(
            [(f"cook {food} with oven", "Lost!")],
            tokenizer=tokenizer,
            task=food,
            text=f"fry the {food}",
            is_success=False,
        )
        for food in FOODS
    ]
    return won + lost


@pytest.fixture
def spec_for(tiny_base, tokenizer, tmp_path):
    """Write rows and return the spec of a short training on them."""

    def make(kind: str, **fields) -> TrainingSpec:
        graded = episodes(tokenizer)
        config = DemonstrationConfig(keep_memory_share=0)
        built = (
            build_demonstrations(graded, tokenizer, config=config, max_length_tokens=2048)
            if kind == "sft"
            else build_preferences(graded, tokenizer, config=PreferenceConfig(), max_length_tokens=2048)
        )
        rows_path = tmp_path / f"{kind}.jsonl"
        write_rows(built.rows, rows_path)
        defaults = {
            "name": "tiny",
            "version": 1 if kind == "sft" else 2,
            "base_model": str(tiny_base),
            "rows_path": rows_path,
            "output_dir": tmp_path / "adapters" / f"tiny-{kind}",
            "work_dir": tmp_path / "work" / kind,
            "trajectory_ids": built.trajectory_ids,
            "lora_rank": 8,
            "lora_alpha": 16,
            "learning_rate": 5e-3,
            "epochs": 3,
            "batch_size": 4,
            "rows_per_pass": 4,
            "num_threads": 1,
            "device": "cpu",
        }
        return TrainingSpec(kind=kind, **{**defaults, **fields})

    return make


def load_logits(tiny_base, adapter):
    """Return (bare, adapted) logits of one row of tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(10, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        bare = base(ids).logits.clone()
        adapted = PeftModel.from_pretrained(base, str(adapter))(ids).logits
    return bare, adapted


@pytest.mark.parametrize("num_steps", [1, 5, 9, 27, 1000])
def test_no_step_is_taken_at_learning_rate_0(num_steps: int):
    num_warmup = math.ceil(0.05 * num_steps)
    shares = [share_of_rate(step, num_warmup=num_warmup, num_steps=num_steps) for step in range(num_steps)]
    assert all(share > 0 for share in shares)
    assert max(shares) == 1.0 or num_steps == 1
    assert shares[num_warmup:] == sorted(shares[num_warmup:], reverse=True)


async def test_the_first_step_of_both_trainers_learns(spec_for):
    rates: dict[str, list[float]] = {"sft": [], "dpo": []}
    for kind, learned in rates.items():

        async def on_step(told, learned=learned):
            learned.append(told["learning_rate"])

        await train(spec_for(kind, epochs=1), on_step=on_step)
    assert all(learned[0] > 0 for learned in rates.values())


def test_a_trainer_sees_the_one_gpu_it_was_given(spec_for, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    given = child_environment(spec_for("sft", visible_device="3"))
    assert given["CUDA_VISIBLE_DEVICES"] == "3" and given["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert child_environment(spec_for("sft"))["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_a_training_is_the_same_on_whichever_gpu_it_goes_on(spec_for):
    spec = spec_for("sft")
    elsewhere = spec.model_copy(update={"visible_device": "1", "rows_per_pass": 1})
    assert elsewhere.digest() == spec.digest()
    assert spec.model_copy(update={"batch_size": 2}).digest() != spec.digest()


async def test_sft_then_dpo_leave_adapters_that_an_engine_may_load(spec_for, tiny_base):
    steps = []

    async def on_step(told):
        steps.append(told)

    sft = spec_for("sft")
    manifest = await train(sft, on_step=on_step)
    dpo = spec_for("dpo", parent=1, parent_adapter=sft.output_dir, learning_rate=1e-3, sft_weight=0.2)
    refined = await train(dpo, on_step=on_step)

    for adapter in (sft.output_dir, dpo.output_dir):
        verify_adapter(adapter, base_digest=digest_base(tiny_base), max_rank=16)
        bare, adapted = load_logits(tiny_base, adapter)
        assert (bare - adapted).abs().max() > 1e-3
    assert not (dpo.output_dir / "ref").exists()
    assert manifest.metrics["loss/last"] < manifest.metrics["loss/first"]
    assert refined.metrics["rewards/margins/last"] > 0
    assert manifest.fingerprint.base_logprobs != manifest.fingerprint.adapter_logprobs
    assert len(manifest.fingerprint.adapter_logprobs) == len(manifest.fingerprint.token_ids) - 1
    assert steps[0]["step"] == 1 and steps[0]["total"] == manifest.metrics["num_steps"]
    assert await train(dpo) == refined  # finished before, so it is not trained again


async def test_search_trains_as_dpo_does_under_its_own_name(spec_for):
    search, dpo = spec_for("search", version=3), spec_for("dpo")

    trained, reference = await train(search), await train(dpo)

    assert (trained.kind, reference.kind) == ("search", "dpo") and trained.metrics["rewards/margins/last"] > 0
    assert trained.metrics["loss/last"] == reference.metrics["loss/last"]


async def test_adapters_left_on_the_way_are_whole_and_less_trained_than_the_last(spec_for, tiny_base, tmp_path):
    sft = spec_for("sft")
    await train(sft)
    dpo = spec_for("dpo", version=4, parent=1, parent_adapter=sft.output_dir, learning_rate=1e-3)
    early = [
        EarlyAdapter(version=2 + number, output_dir=tmp_path / "adapters" / f"tiny-early-{number}", share=share)
        for number, share in enumerate((1 / 3, 2 / 3))
    ]
    dpo = dpo.model_copy(update={"early_adapters": early})

    manifest = await train(dpo)

    adapters = [*(it.output_dir for it in early), dpo.output_dir]
    for it in early:
        verify_adapter(it.output_dir, base_digest=digest_base(tiny_base), max_rank=16)
        assert read_finished(dpo.at(it)).metrics["num_steps"] == round(it.share * manifest.metrics["num_steps"])
    _, start = load_logits(tiny_base, sft.output_dir)
    distances = [float((load_logits(tiny_base, adapter)[1] - start).abs().mean()) for adapter in adapters]
    assert distances == sorted(distances) and distances[0] > 0


@pytest.mark.parametrize("kind", ["sft", "dpo"])
async def test_a_trainer_killed_in_mid_training_is_resumed_to_a_finished_adapter(kind, spec_for, tiny_base):
    spec = spec_for(kind, epochs=10, num_checkpoints=10)
    killed_at = []

    async def kill_once(told):
        if told["step"] >= 6 and not killed_at:
            killed_at.append(told["step"])
            os.kill(find_trainer(spec), signal.SIGKILL)

    with pytest.raises(TrainingError, match="was killed by SIGKILL at step"):
        await train(spec, on_step=kill_once, num_attempts=1)
    assert not spec.output_dir.exists()

    steps = []

    async def on_step(told):
        steps.append(told["step"])

    manifest = await train(spec, on_step=on_step, num_attempts=1)

    assert steps[0] > 1  # it resumed
    assert steps[-1] == manifest.metrics["num_steps"]
    verify_adapter(spec.output_dir, base_digest=digest_base(tiny_base), max_rank=16)


def find_trainer(spec: TrainingSpec) -> int:
    """Return the process id of this spec's trainer."""
    for process in os.listdir("/proc"):
        if process.isdigit():
            try:
                with open(f"/proc/{process}/cmdline", "rb") as file:
                    if str(spec.work_dir).encode() in file.read():
                        return int(process)
            except OSError:
                continue
    raise AssertionError("no trainer is running")


async def test_a_trainer_that_cannot_work_says_why_with_the_end_of_its_log(spec_for, tmp_path):
    spec = spec_for("sft", base_model=str(tmp_path / "nowhere"))

    with pytest.raises(TrainingError, match="before its first step") as caught:
        await train(spec, num_attempts=1)

    assert "nowhere" in str(caught.value)
    assert str(log_path(spec)) in str(caught.value)


async def test_a_cancelled_training_leaves_no_process_behind(spec_for):
    spec = spec_for("sft", epochs=500)
    is_training = asyncio.Event()

    async def on_step(told):
        is_training.set()

    training = asyncio.create_task(train(spec, on_step=on_step))
    async with asyncio.timeout(120):
        await is_training.wait()
    pid = find_trainer(spec)
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training

    assert not os.path.exists(f"/proc/{pid}")


def test_another_spec_in_the_same_place_is_refused(spec_for):
    spec = spec_for("sft")
    spec.output_dir.mkdir(parents=True)
    manifest = {
        "name": "x",
        "version": 1,
        "base_model": "b",
        "base_digest": "d",
        "kind": "sft",
        "settings": {"spec_digest": "other"},
    }
    (spec.output_dir / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(FileExistsError, match="never overwritten"):
        asyncio.run(train(spec))

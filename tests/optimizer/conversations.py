"""Single-turn chats as a server records them: a question, one reply with its token ids, and an optional thumb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from memory.schema import Feedback, RewardSource, Step, StepKind, Trajectory, TrajectoryStage, new_id
from memory.store import Memory
from optimizer.data.stitching import render_prompt

GOOD, BAD = "Gladly: it is {}.", "No idea about {}!"


def reply(tokenizer: Any, number: int, text: str) -> tuple[list[dict[str, Any]], list[int], list[int]]:
    """Return (messages, prompt ids, reply ids) of one conversation."""
    opening = [{"role": "user", "content": f"What is {number} and {number}?"}]
    said = tokenizer(text.format(2 * number) + "<|im_end|>", add_special_tokens=False)["input_ids"]
    return opening, render_prompt(tokenizer, opening, []), said


async def converse(
    memory: Memory, tokenizer: Any, number: int, *, is_good: bool, by_verifier: bool = False, **feedback: Any
) -> Trajectory:
    """Record one conversation and a thumb on it, or the grade of a verifier."""
    text = GOOD if is_good else BAD
    opening, prompt, said = reply(tokenizer, number, text)
    trajectory = await memory.trajectories.open(
        Trajectory(
            id=new_id("trj"),
            episode_id=new_id("epi"),
            policy=0,
            opening=opening,
            task_text=opening[0]["content"],
        )
    )
    step = Step(
        trajectory_id=trajectory.id,
        position=0,
        kind=StepKind.MODEL,
        content=text.format(2 * number),
        finish_reason="stop",
        prompt_token_ids=prompt,
        output_token_ids=said,
    )
    await memory.trajectories.append(step, trajectory=trajectory)
    closed = await memory.trajectories.close(trajectory.id, stage=TrajectoryStage.FINISHED, answer=step.content)
    if by_verifier:
        await memory.trajectories.reward(trajectory.id, float(is_good), RewardSource.VERIFIER)
    else:
        await memory.feedback.post(Feedback(trajectory_id=trajectory.id, value=is_good, **feedback))
    return closed


@torch.no_grad()
def margin(base: Path, adapter: Path | None, tokenizer: Any, numbers: range) -> float:
    """Return the mean log-prob of whole good replies minus that of bad ones."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))

    def logprob(number: int, text: str) -> float:
        _, prompt, said = reply(tokenizer, number, text)
        logits = model(input_ids=torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).sum().item()

    return sum(logprob(number, GOOD) - logprob(number, BAD) for number in numbers) / len(numbers)

"""Two plain PyTorch loops train one adapter together: each has the whole model, and only adapters travel."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import swarm


def train(base: PreTrainedModel, run: object) -> torch.nn.Module:
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with swarm.member(model, optimizer, run, host="127.0.0.1") as member:
        for step in range(32):
            ids = (torch.randint(64, (8, 1)) + torch.arange(24)) % 64  # rows that count upwards
            (loss := model(input_ids=ids, labels=ids).loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            member.step(samples=8, tokens=8 * 23, loss=loss.item())
            if step % 16 == 15:  # a loop need not wait, but this one would be over before a round
                member.wait_for_round(1 + step // 16, seconds=60)
                print(f"step {step + 1}, loss {loss.item():.2f}, round {member.round}")
    return model


def main(directory: Path) -> list[torch.nn.Module]:
    config = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, initializer_range=0.15)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "llama")  # tiny; name your own instead
    run = swarm.init(directory / "counting", str(directory / "llama"), rounds={"round_samples": 2 * 8 * 16})
    models = [AutoModelForCausalLM.from_pretrained(directory / "llama") for _ in "ab"]  # in turn, never at once
    return list(ThreadPoolExecutor().map(train, models, [run] * 2))  # two machines, really


if __name__ == "__main__":
    main(Path(tempfile.mkdtemp(prefix="own-loop-")))

"""Two Hugging Face Trainers train one adapter together: one line makes a Trainer a member of a run."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import swarm


def make(base: Path) -> Trainer:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=8, lora_alpha=16))
    rows = [{"input_ids": ids, "labels": ids} for ids in ((torch.arange(24) + 5 * i) % 64 for i in range(128))]
    given = {"per_device_train_batch_size": 8, "eval_strategy": "epoch", "report_to": [], "save_strategy": "no"}
    arguments = TrainingArguments(base, learning_rate=1e-2, num_train_epochs=2, use_cpu=True, **given)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:16])


def train(trainer: Trainer, run: object) -> Trainer:
    swarm.attach(trainer, run, host="127.0.0.1", ending=swarm.Ending(last_round=1))
    trainer.train()
    return trainer


def main(directory: Path) -> list[Trainer]:
    config = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, initializer_range=0.15)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "llama")  # tiny; name your own instead
    run = swarm.init(directory / "counting", str(directory / "llama"), rounds={"round_samples": 2 * 2 * 128})
    trainers = [make(directory / "llama") for _ in "ab"]  # in turn, never at once
    return list(ThreadPoolExecutor().map(train, trainers, [run] * 2))  # two machines, really


if __name__ == "__main__":
    for trainer in main(Path(tempfile.mkdtemp(prefix="hf-trainer-"))):
        print("losses", *(f"{log['eval_loss']:.2f}" for log in trainer.state.log_history if "eval_loss" in log))

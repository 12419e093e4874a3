"""Two loops of Lightning train one adapter together: one callback makes a loop a member of a run."""

import tempfile
from concurrent.futures import ThreadPoolExecutor

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import swarm


class Counting(pl.LightningModule):
    def __init__(self, base: str) -> None:
        super().__init__()
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=8, lora_alpha=16))

    def training_step(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def main(directory: str) -> list[Counting]:
    config = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, initializer_range=0.15)
    AutoModelForCausalLM.from_config(config).save_pretrained(f"{directory}/llama")  # tiny; name your own instead
    run = swarm.init(f"{directory}/counting", f"{directory}/llama", rounds={"round_samples": 2 * 256})
    modules = [Counting(f"{directory}/llama") for _ in "ab"]
    callbacks = [swarm.SwarmCallback(run, host="127.0.0.1", ending=swarm.Ending(last_round=1)) for _ in modules]
    trainers = [pl.Trainer(accelerator="cpu", max_epochs=1, barebones=True, callbacks=[each]) for each in callbacks]
    data = [torch.utils.data.DataLoader([(torch.arange(24) + 5 * i) % 64 for i in range(256)], batch_size=8)] * 2
    list(ThreadPoolExecutor().map(pl.Trainer.fit, trainers, modules, data))  # two machines, really
    return modules


if __name__ == "__main__":
    main(tempfile.mkdtemp(prefix="lightning-"))

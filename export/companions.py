"""What lies beside the engines of a folder, so that it is complete."""

import json
from pathlib import Path
from typing import Any

from encache.model.family import family_of


def write_companions(pipeline: Any, folder: Path) -> None:
    """Tokenizers, scheduler and index, as in a diffusers folder."""
    tokenizers = {name: getattr(pipeline, name) for name in family_of(pipeline).tokenizers}
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    # As the checkpoint wrote it: what it left out is each solver's own default, here as there.
    left_out = {"_use_default_values", *pipeline.scheduler.config.get("_use_default_values", ())}
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    config = folder / "scheduler" / pipeline.scheduler.config_name
    kept = {
        name: value
        for name, value in json.loads(config.read_bytes()).items()
        if name not in left_out
    }
    config.write_text(json.dumps(kept, indent=2) + "\n")
    index = {
        "_class_name": "EncachePipeline",
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
        **{name: ["transformers", type(one).__name__] for name, one in tokenizers.items()},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

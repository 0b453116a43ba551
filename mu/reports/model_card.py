"""Model cards of published models."""

import json
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mu.measures.statistics import score

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
LOAD = {  # code that loads a result of each kind
    "pipeline": """from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("this folder", use_safetensors=True)""",
    "lora": """from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({base!r}, use_safetensors=True)
pipe.load_lora_weights("this folder")""",
    "difference": """from mu.publish.weights import load_weights
from mu.models import load_pipeline
pipe = load_pipeline({base!r})
load_weights(pipe.unet, "this folder")""",
}


def model_card(kind, base_model, license, method, concept, params, metrics=None, extracted=None):
    """Return the model card of a result of `kind` "pipeline", "difference" or "lora".

    license: the base model's. params: as in params.json. metrics: as in metrics.json ("rows",
    "protocol"); None: not evaluated. extracted: (kept, left_out) of `extract_lora`, for a LoRA
    extracted from trained weights. Raises KeyError for another kind.
    """
    kept, left_out = extracted or (None, [])
    protocol = dict(metrics["protocol"]) if metrics else {}
    protocol.pop("run", None)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": _percent, "cell": _cell}
    return environment.get_template(TEMPLATE.name).render(
        header=_header(kind, base_model, license, method).to_yaml(),
        load=LOAD[kind].format(base=base_model),
        version=version("mu"),
        protocol=json.dumps(protocol, indent=1),
        scores=_scores(metrics["rows"]) if metrics else [],
        kind=kind,
        base_model=base_model,
        method=method,
        concept=concept,
        params=params,
        metrics=metrics,
        kept=kept,
        left_out=left_out,
    )


def _header(kind, base_model, license, method):
    """Return the metadata of the card."""
    is_lora = kind == "lora"
    return ModelCardData(
        license=license,
        base_model=base_model,
        base_model_relation="adapter" if is_lora else "finetune",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["unlearning", "concept-erasure", method, *(["lora"] if is_lora else [])],
    )


def _scores(rows):
    """Return (name, images, share, low, high) of each group, split by model, lr and step."""
    hits = {}
    for row in rows:
        facts = [f"{fact} {row[fact]}" for fact in ("model", "lr", "step") if fact in row]
        hits.setdefault(", ".join([row["group"], *facts]), []).append(row["hit"])
    return [(name, len(found), *score(found)) for name, found in hits.items()]


def _percent(share):
    return f"{100 * share:.1f} %"


def _cell(value):
    return json.dumps(value, ensure_ascii=False).replace("|", "\\|")

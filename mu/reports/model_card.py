"""The model card of a published model."""

import json
from importlib.metadata import version

from huggingface_hub import ModelCardData

from mu.measures.statistics import score

LOAD = {  # what a card says of each kind
    "pipeline": """from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("this folder", use_safetensors=True)
""",
    "lora": """from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({base!r}, use_safetensors=True)
pipe.load_lora_weights("this folder")
""",
    "difference": """from mu.publish.weights import load_weights
from mu.models import load_pipeline
pipe = load_pipeline({base!r})
load_weights(pipe.unet, "this folder")
""",
}


def model_card(
    kind, base_model, license, method, concept, params, metrics=None, kept=None, left_out=()
):
    """Text of a model card for a result of `kind` "pipeline", "difference" or "lora". Every figure in it comes from the arguments.

    license: the base model's. params: as in params.json. metrics: as in metrics.json ("rows", "protocol"), or None: nothing was measured.
    kept, left_out: of `extract_lora`. Raises KeyError for another kind."""

    def percent(x):
        return f"{100 * x:.1f} %"

    def table(*lines):
        return "\n".join(
            "| " + " | ".join(cells) + " |"
            for cells in (lines[0], ["---"] * len(lines[0]), *lines[1:])
        )

    def cell(value):
        return json.dumps(value, ensure_ascii=False).replace("|", "\\|")

    lora = ["lora"] if kind == "lora" else []
    header = ModelCardData(
        license=license,
        base_model=base_model,
        base_model_relation="adapter" if lora else "finetune",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["unlearning", "concept-erasure", method, *lora],
    )
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {base_model}, unlearned: {concept}",
        f"Trained by {method} (mu {version('mu')}), with the aim that it no longer draws what is named above.",
        "## Load",
        f"```python\n{LOAD[kind].format(base=base_model)}```",
        "## What was done",
        table(["parameter", "value"], *([k, cell(v)] for k, v in params.items())),
    ]
    if kept is not None:
        names = ", ".join([*left_out[:3], *["..."] * (len(left_out) > 3)])
        parts.append(
            f"This LoRA was extracted from trained weights and keeps {percent(kept)} of their squared difference to the base. Not in it are "
            f"{len(left_out)} tensors that changed and that LoRA cannot hold (norms, biases){names and ': ' + names}. "
            "Scores below are the trained weights' own, unless the protocol says that this LoRA was measured."
        )
    parts.append("## Measured")
    if metrics:
        groups = {}
        for row in metrics["rows"]:
            name = ", ".join(
                [row["group"], *(f"{k} {row[k]}" for k in ("model", "lr", "step") if k in row)]
            )
            groups.setdefault(name, []).append(row["hit"])
        found = [(name, len(hits), *map(percent, score(hits))) for name, hits in groups.items()]
        protocol = {k: v for k, v in metrics["protocol"].items() if k != "run"}
        parts += [
            table(
                [
                    "prompts",
                    "images that show what the prompt names",
                    "95 % interval (Wilson)",
                    "images",
                ],
                *(
                    [group, share, f"{low} to {high}", str(n)]
                    for group, n, share, low, high in found
                ),
            ),
            f"```json\n{json.dumps(protocol, indent=1)}\n```",
        ]
    else:
        parts.append("Nothing: this card makes no claim about what the model draws.")
    parts += [
        "## Limits",
        "Nothing is claimed beyond what is measured above. Other prompts, samplers or judges may still find the concept, and an "
        "attacker may still bring it back: by longer or other fine-tuning, by learned embeddings, by merging with another model."
        + (
            ""
            if kind == "pipeline"
            else " Whoever leaves these weights out has the base model, concept and all."
        ),
    ]
    return "\n\n".join(parts) + "\n"

"""The model card: ``README.md`` beside an exported checkpoint says what is in it, how it was proven, how to load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from qat.rewriter import Row, coverage, prepared_state


def model_card(deployed: nn.Module, format: str, loading: Mapping[str, str], sizes: Mapping[str, int],
               notes: Sequence[str] = ()) -> str:
    """The text of a model card, the same for the same model: no times, no paths.

    Args:
        deployed: what was exported.
        format: as it is called in :data:`qat.deploy.export.FORMATS`.
        loading: runtime -> the code that loads the checkpoint there.
        sizes: file -> bytes.
        notes: what a user of this checkpoint must know, each a sentence or two.
    """
    state, covered = prepared_state(deployed), coverage(deployed)
    kept = [row for row in covered.rows if row.status == "kept"]
    schemes = Counter((row.weight, row.input) for row in covered.rows if row.status == "quantized")
    parameters = Counter[tuple[str, str]]()
    for row in covered.rows:
        if row.status == "quantized":
            parameters[row.weight, row.input] += row.params
    lines = [
        f"# {type(deployed).__name__}, quantized", "",
        f"Format: {format}. Recipe: {state.recipe.name or 'its own'}.", "",
        "| weights | inputs | layers | parameters |", "|---|---|---|---|",
        *(f"| {weight} | {inputs} | {count} | {parameters[weight, inputs]:,} |"
          for (weight, inputs), count in sorted(schemes.items())), "",
        f"{covered.quantized_params:,} of {covered.total_params:,} parameters are quantized ({covered.fraction:.1%}).",
        *_listed("Kept in floating point", _grouped(kept)),
        "", "## Certificate", "", _certificate(deployed.__dict__.get("_qat_certificate")),
        *_listed("To know", notes),
        "", "## Loading",
        *(line for runtime, code in loading.items() for line in ("", f"{runtime}:", "", *_indented(code))),
        "", "## Files", "", "| file | bytes |", "|---|---|",
        *(f"| {name} | {size:,} |" for name, size in sorted(sizes.items())),
    ]
    return "\n".join(lines) + "\n"


def _grouped(rows: Sequence[Row]) -> list[str]:
    """Reasons, each with how many layers of which kinds it is about and the first of them."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.reason), []).append(row)
    return [f"{len(found)} x {kind} ({sum(r.params for r in found):,} parameters; {found[0].name}"
            f"{', ...' if len(found) > 1 else ''}): {reason}" for (kind, reason), found in groups.items()]


def _listed(title: str, entries: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {entry}" for entry in entries)] if entries else []


def _indented(code: str) -> list[str]:
    return [f"    {line}".rstrip() for line in code.splitlines()]


def _certificate(proof: Mapping[str, Any] | None) -> str:
    if proof is None:
        return "None is stored with this model."
    return (f"On {proof['samples']:,} samples in {proof['batches']} batches the deployed model was compared with the "
            f"trained one in {len(proof['layers'])} layers: greatest output difference "
            f"{proof['max_output_difference']:g}, equal predictions {proof['prediction_agreement']:.2%}, "
            f"{'equal bit for bit' if proof['equal'] else 'NOT EQUAL'}. That is about the deployed model, whose "
            "codes and scales are the ones in this file.")

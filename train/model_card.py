"""Write the model card of a checkpoint: ``python -m train.model_card --model DIR --results FILE --out DIR/README.md``.

Everything in it follows from the checkpoint and from files that other commands leave. What is not given is left out,
with the command that makes it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from speechllm.checkpoint import load_checkpoint
from speechllm.errors import InputError
from train import card_sections as sections
from train.card_inputs import Inputs, read_calibration, read_corpus_report, read_icl
from train.codec import CodecTraining
from train.commands import plain_errors
from train.config import read_config
from train.kept import weights_fingerprint
from train.licences import TABLE, read_licences
from train.pretrain_config import Pretraining
from train.results import read_results
from train.stage_costs import of_stages, read_costs

SECTIONS = {
    "Intended use": sections.intended_use,
    "Out of scope": sections.out_of_scope,
    "Sizes": sections.sizes,
    "Training": sections.training,
    "Data": sections.data,
    "Results": sections.evaluation,
    "In-context learning": sections.in_context,
    "Confidence": sections.confidence,
    "Limits and biases": sections.limits,
    "Licence": sections.licence_text,
}


def card(inputs: Inputs) -> str:
    """The whole file. Raises InputError when something it was trained on has no licence."""
    parts = [sections.front_matter(inputs), f"# {inputs.checkpoint.settings.name}\n", sections.size_line(inputs)]
    parts += [f"## {title}\n\n{section(inputs)}" for title, section in SECTIONS.items()]
    return "\n".join(parts)


def check_belongs(inputs: Inputs) -> None:
    """Raises InputError when something tells of another checkpoint."""
    folder, settings = inputs.checkpoint.folder, inputs.checkpoint.settings
    told = {
        "--results": inputs.results and (inputs.results.checkpoint, inputs.results.fingerprint),
        "--icl": inputs.icl and (inputs.icl.model, inputs.icl.fingerprint),
        "--calibration": inputs.calibration and (inputs.calibration.model, inputs.calibration.fingerprint),
    }
    weights = weights_fingerprint(folder, settings, None) if any(told.values()) else ""
    for option, (name, fingerprint) in ((option, own) for option, own in told.items() if own):
        if name != settings.name:
            raise InputError(
                f"{option}: of the checkpoint {name}, not of {settings.name} in {folder}; measure that one"
            )
        if fingerprint != weights:
            raise InputError(f"{option}: of other weights or settings than those in {folder}; measure these")


def put_beside(pictures: dict[str, Path], folder: Path) -> None:
    """Copy the pictures into the folder, under these names."""
    for name, path in pictures.items():
        if path.resolve() != (folder / name).resolve():
            shutil.copyfile(path, folder / name)


def main(
    model: Annotated[Path, typer.Option(help="checkpoint folder")],
    out: Annotated[Path, typer.Option(help="the card; pictures are copied beside it")],
    results: Annotated[Path | None, typer.Option(help="results.json of train.evaluate")] = None,
    icl: Annotated[Path | None, typer.Option(help="results.json of train.evaluate_icl")] = None,
    calibration: Annotated[Path | None, typer.Option(help="calibration.json of train.calibrate")] = None,
    stages: Annotated[Path | None, typer.Option(help="stages.jsonl of train.release")] = None,
    corpus: Annotated[Path | None, typer.Option(help="corpus.json of train.corpus")] = None,
    pretrain: Annotated[
        list[Path] | None, typer.Option(help="config of a training that led to it; repeatable, in order")
    ] = None,
    codec: Annotated[Path | None, typer.Option(help="config that its codec was trained with")] = None,
    licences: Annotated[Path, typer.Option(help="table of the licences of what is trained on")] = TABLE,
) -> None:
    """Write a checkpoint's model card from what is known of it."""
    with plain_errors():
        configs = tuple(read_config(path, Pretraining) for path in pretrain or ())
        found = {f"{name}.png": results.parent / f"{name}.png" for name in ("results", "bias")} if results else {}
        found |= {"shots.png": icl.parent / "results.png"} if icl else {}
        found |= {"calibration.png": calibration.parent / "calibration.png"} if calibration else {}
        found |= {"training.png": configs[-1].out / "training.png"} if configs else {}
        found = {name: path for name, path in found.items() if path.is_file()}
        inputs = Inputs(
            licences=read_licences(licences),
            results=read_results(results) if results else None,
            icl=read_icl(icl) if icl else None,
            calibration=read_calibration(calibration) if calibration else None,
            costs=tuple(of_stages(read_costs(stages))) if stages else (),
            corpus=read_corpus_report(corpus) if corpus else None,
            pretrain=configs,
            codec=read_config(codec, CodecTraining) if codec else None,
            pictures=tuple(found),
            checkpoint=load_checkpoint(model),
        )
        check_belongs(inputs)
        text = card(inputs)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            put_beside(found, out.parent)
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error
    typer.echo(f"{out}: written")


if __name__ == "__main__":
    typer.run(main)

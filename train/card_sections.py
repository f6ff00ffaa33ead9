"""The sections of a model card, each Markdown that follows from its inputs alone."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from speechllm.model import experts, parameter_counts
from speechllm.tasks import TASKS
from speechllm.tasks.words import Words
from train.amounts import shown_time
from train.assemble import megabytes
from train.breakdown import bias_table, gaps
from train.calibration_report import markdown as calibration_markdown
from train.card_inputs import Inputs
from train.corpus_config import SPOKEN
from train.evaluate_report import HELD_OUT, geometric_mean, results_table, scores, shown, targets_table
from train.icl_report import is_learnt
from train.icl_report import markdown as icl_markdown
from train.results import NAMES, OURS, Evaluation, Target
from train.stage_costs import cost_table

PARTS = ("lm", "codec")  # folders of a checkpoint with weights


def left_out(what: str, command: str) -> str:
    return f"*Left out: {what}, which {command} makes.*\n"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines) + "\n"


def instructions(names: Sequence[str]) -> list[str]:
    """A line for each task: its name, and what asks for it."""
    return [f"- `{name}`: “{TASKS[name].wordings[0].replace('{}', '…')}”" for name in names if name in TASKS]


def judged(results: Evaluation) -> tuple[list[Target], list[Target]]:
    """Rows of tasks that were trained and must reach something: those that do, and those that do not."""
    reached: list[Target] = []
    missed: list[Target] = []
    for target in results.targets:
        if target.at_least is not None and (own := results.whole(target)) is not None:
            (reached if target.reached(own.value, target.at_least) else missed).append(target)
    return reached, missed


def front_matter(inputs: Inputs) -> str:
    """The YAML that Hugging Face reads."""
    checkpoint, heard = inputs.checkpoint, inputs.heard()
    tasks, config = checkpoint.settings.tasks, checkpoint.lm.config
    recorded = [name for name in inputs.licences.sources(heard) if not name.startswith("voices")]
    told: dict[str, object] = {"license": licence(inputs)}
    if told["license"] != "apache-2.0":  # Hugging Face knows no name for it
        told |= {"license": "other", "license_name": told["license"]}
    targets = [task.target for name in tasks if isinstance(task := TASKS.get(name), Words) and task.target]
    told["language"] = list(dict.fromkeys([*spoken(inputs), *targets])) or None
    told["library_name"] = "speechllm"
    told["pipeline_tag"] = "automatic-speech-recognition" if "transcribe" in tasks else "audio-text-to-text"
    kinds = {"speech-translation": "translate_", "speaker-diarization": "diarize", "emotion-recognition": "emotion"}
    tags = ["speech", "audio", "speechllm", config.model_type, *(["mixture-of-experts"] if experts(config) else [])]
    told["tags"] = tags + [tag for tag, name in kinds.items() if any(task.startswith(name) for task in tasks)]
    told["datasets"] = recorded or None
    given = {name: value for name, value in told.items() if value is not None}
    return f"---\n{yaml.safe_dump(given, sort_keys=False, allow_unicode=True)}---\n"


def spoken(inputs: Inputs) -> list[str]:
    """Languages that the language model has heard."""
    return inputs.licences.languages(inputs.heard_by_lm())


def licence(inputs: Inputs) -> str:
    """What the use of the weights is restricted to, or the licence where it is not."""
    heard = inputs.heard()
    if inputs.licences.used(heard, "noncommercial"):
        return "non-commercial"
    if inputs.licences.used(heard, "research"):
        return "research"
    return "apache-2.0" if inputs.all_heard_known else "unknown"


def size_line(inputs: Inputs) -> str:
    """The model in a sentence."""
    lm = inputs.checkpoint.lm
    total, active = parameter_counts(lm)
    number, top_k = experts(lm.config) or (1, 1)
    shares = f" ({active / 1e6:.1f} M active: {top_k} of {number} experts)" if number > 1 else ""
    return (
        f"A speech language model on audio codes: {lm.config.model_type}, {total / 1e6:.1f} M parameters{shares}. "
        "Written by `python -m train.model_card` from files of its training and evaluation: change it there.\n"
    )


def intended_use(inputs: Inputs) -> str:
    settings = inputs.checkpoint.settings
    languages = ", ".join(spoken(inputs)) or "the languages of its training data"
    lines = [
        "Trying out and developing speechllm, and research on small speech models. It answers these instructions, and "
        f"other wordings of them, about speech ({languages}); what is longer than {settings.max_audio_seconds:g} s is "
        "cut at pauses and answered piece by piece:\n",
        *instructions(settings.tasks),
        "",
    ]
    if inputs.results and (reached := judged(inputs.results)[0]):
        named = "; ".join(told(inputs.results, target) for target in reached)
        lines.append(f"Good enough to be used, by the release's own measure: {named}. See the results.\n")
    return "\n".join(lines)


def told(results: Evaluation, target: Target) -> str:
    """The label of a row that reaches what it must, and whether that may be by chance."""
    own, wanted = results.whole(target), target.at_least
    assert own is not None and wanted is not None
    return f"{target.label} (unsure)" if target.unsure(own, wanted) else target.label


def out_of_scope(inputs: Inputs) -> str:
    settings = inputs.checkpoint.settings
    other = [name for name, task in TASKS.items() if task.listens and name not in settings.tasks]
    lines = [
        "- Anything that matters: medical, legal or safety-critical transcripts, or decisions about people. What it "
        "says of voices (gender, accent, emotion, who speaks) is a guess from sound, no ground for treating anybody "
        "otherwise.",
        "- Identifying or watching people, or recording them without their consent.",
        "- Other languages, topics and recordings than those of its training: answers are often fluent and wrong.",
    ]
    if other:
        lines.append(f"- Tasks it was not trained on: {', '.join(f'`{name}`' for name in other)}.")
    return "\n".join(lines) + "\n"


def sizes(inputs: Inputs) -> str:
    checkpoint = inputs.checkpoint
    lm, codec, vocabulary, settings = checkpoint.lm, checkpoint.codec, checkpoint.vocabulary, checkpoint.settings
    total, active = parameter_counts(lm)
    number, top_k = experts(lm.config) or (1, 1)
    stored = megabytes([checkpoint.folder / part for part in PARTS])
    return table(
        ("", ""),
        (
            ("parameters", f"{total:,}"),
            ("active for a position", f"{active:,}"),
            ("experts of a layer", f"{number}, {top_k} of them active" if number > 1 else "none: dense"),
            ("layers, width, positions", layers(lm.config)),
            ("weights on the disk", f"{stored:.1f} MB with the codec"),
            (
                "codec",
                f"{type(codec).__name__}, {codec.sample_rate:,} Hz, {codec.frame_rate:g} frames a "
                f"second, {codec.n_q} codebooks of {codec.card} codes",
            ),
            ("audio is heard as", vocabulary.heard()),
            ("text pieces", f"{checkpoint.text.size:,}"),
            ("vocabulary", f"{vocabulary.size:,} ids"),
            ("longest audio", f"{settings.max_audio_seconds:g} s at once"),
            ("longest answer", f"{settings.max_answer_tokens} ids"),
            ("tasks", ", ".join(settings.tasks)),
            ("fingerprint of the vocabulary", f"`{settings.fingerprint[:16]}`"),
        ),
    )


def layers(config: object) -> str:
    names = ("num_hidden_layers", "hidden_size", "max_position_embeddings")
    return ", ".join(f"{getattr(config, name):,}" for name in names)


def training(inputs: Inputs) -> str:
    parts = []
    if runs := inputs.runs():
        rows = [
            (
                run.name,
                f"{run.steps:,}",
                "" if run.ids is None else f"{run.ids / 1e6:.1f} M",
                "" if run.hours is None else f"{run.hours:.1f} h",
                shown_time(run.seconds),
            )
            for run in runs
        ]
        parts += [
            table(("run", "steps", "ids", "audio heard", "wall clock"), rows),
            "Ids without padding, audio as often as heard, by rates that are logged; wall clock with validation.\n",
        ]
        if missing := inputs.unlogged():
            parts.append(f"Trained as well, and not in these tables for want of a log: {'; '.join(missing)}.\n")
    else:
        command = "`train/pretrain.py` (its config given as `--pretrain`)"
        parts.append(left_out("steps, ids and hours (`metrics.jsonl`)", command))
    for config in inputs.pretrain:
        if config.start_from and config.start_from not in [other.out / "checkpoint" for other in inputs.pretrain]:
            parts.append(f"{config.out.name} began as {config.start_from}, with what that had heard.\n")
    if inputs.costs:
        parts.append(cost_table(inputs.costs))
        energy = "; ".join(dict.fromkeys(cost.energy for cost in inputs.costs))
        parts.append(f"Energy: {energy}. Stages that were stopped and taken up count with all their starts.\n")
    else:
        parts.append(left_out("time and energy of each stage", "`python -m train.release`"))
    return "\n".join(parts + pictures(inputs, "training"))


def data(inputs: Inputs) -> str:
    heard, by_codec = inputs.heard(), inputs.heard_by_codec()
    if not heard:
        return left_out("what it was trained on (`corpus.json`)", "`python -m train.corpus`")
    parts, corpora = [], inputs.corpus["corpora"] if inputs.corpus else {}
    by_lm = inputs.heard_by_lm()
    rows = []
    for name in heard:
        told = corpora.get(name, {})
        train = told.get("splits", {}).get("train")
        amounts = [""] * 3
        if train:
            spoken = [f"{train['hours']:.1f}", train["speakers"]] if told["kind"] in SPOKEN else ["", ""]
            amounts = [f"{train['utterances']:,}", *spoken]
        heard_by = [part for part, names in (("language model", by_lm), ("codec", by_codec)) if name in names]
        of = ", ".join(inputs.licences.sources([name]))
        rows.append((name, ", ".join(heard_by), told.get("kind", ""), *amounts, of))
    head = ("corpus", "heard by", "kind", "train examples", "hours", "speakers", "sources")
    parts += [table(head, rows), synthetic_share(inputs)]
    if not inputs.corpus:
        parts.append(left_out("sizes of the corpora (`corpus.json`)", "`python -m train.corpus`"))
    entries = [(name, inputs.licences.entry(name)) for name in inputs.licences.sources(heard)]
    uses = {"free": "", "research": "research", "noncommercial": "non-commercial"}
    parts.append(
        table(
            ("source", "what it is", "licence", "restricted to"),
            [(name, entry.title, entry.licence, uses[entry.use or "free"]) for name, entry in entries],
        )
    )
    return "\n".join(filter(None, parts))


def synthetic_share(inputs: Inputs) -> str:
    """How much of what the language model heard was spoken by machines; "" where sizes are not known."""
    corpora = inputs.corpus["corpora"] if inputs.corpus else {}
    hours: dict[str, float] = dict.fromkeys(SPOKEN, 0.0)
    for name in inputs.heard_by_lm():
        if name in corpora and corpora[name]["kind"] in SPOKEN:
            hours[corpora[name]["kind"]] += corpora[name]["splits"].get("train", {"hours": 0.0})["hours"]
    whole = sum(hours.values())
    if not whole:
        return ""
    share = {kind: f"{100 * own / whole:.0f} %" for kind, own in hours.items()}
    return (
        f"{whole:.1f} h for the language model, varied copies not counted: {share['synthesized']} spoken by machines, "
        f"{share['conversations']} conversations cut together from other corpora, {share['recorded']} recorded.\n"
    )


def evaluation(inputs: Inputs) -> str:
    results = inputs.results
    if results is None:
        command = "`python -m train.evaluate --suite train/configs/suite-release.yaml --model DIR --out DIR`"
        return left_out("scores on test sets", command)
    parts = []
    if values := list(scores(results).values()):
        parts.append(f"Geometric mean of {len(values)} scores: **{geometric_mean(values):.1f}** of 100.\n")
    if results.targets:
        parts += ["### What a release must reach\n", targets_table(results)]
    whole = [r for r in results.results if not r.group and not r.wording]
    baselines = sorted({r.system for r in whole} - {OURS})
    parts += [f"### Every task{', and baselines' if baselines else ''}\n", results_table(whole)]
    groups = [r for r in results.results if r.group and not r.wording]
    if groups:
        parts += ["### Bias: scores by group\n", bias_table(gaps(results)), results_table(groups)]
    if held_out := [r for r in results.results if r.wording]:
        parts += ["### Wordings that were never trained on\n", HELD_OUT, results_table(held_out, noted=True)]
    parts.append(
        f"Checkpoint {results.fingerprint}, intervals by bootstrap over clips, asked by\n\n    {results.command}\n"
    )
    return "\n".join(filter(None, parts + pictures(inputs, "results", "bias")))


def in_context(inputs: Inputs) -> str:
    if inputs.icl is None:
        return left_out("what it learns from shots", "`python -m train.evaluate_icl --model DIR --out DIR`")
    return "\n".join([icl_markdown(inputs.icl), *pictures(inputs, "shots")])


def confidence(inputs: Inputs) -> str:
    if inputs.calibration is None:
        command = "`python -m train.calibrate --model DIR --dev SET --test SET --out DIR`"
        return left_out("how far confidences can be trusted", command)
    return "\n".join([calibration_markdown(inputs.calibration), *pictures(inputs, "calibration")])


def pictures(inputs: Inputs, *names: str) -> list[str]:
    """Those of these names that are beside the card."""
    return [f"![{name}]({name}.png)\n" for name in names if f"{name}.png" in inputs.pictures]


def limits(inputs: Inputs) -> str:
    """What the numbers say against it."""
    settings, results, lines = inputs.checkpoint.settings, inputs.results, []
    if results is not None:
        reached, missed = judged(results)
        if missed:
            lines.append(
                "Below what a release must reach: " + "; ".join(f"{t.label} ({fault(results, t)})" for t in missed)
            )
        elif reached:
            lines.append(f"All {len(reached)} scores that must reach something do")
        found = gaps(results)
        if found and not any(gap.apart for gap in found):
            lines.append(f"Of {len(found)} gaps between groups none is beyond what chance would do")
        for gap in found:
            if gap.apart:
                worst, best = (f"{own.group.partition('=')[2]} {shown(own)}" for own in (gap.worst, gap.best))
                lines.append(f"{gap.label}, {NAMES[gap.metric]}: worst by {gap.kind} for {worst}, best for {best}")
        for target in results.targets:
            own = results.whole(target)
            for system in sorted({r.system for r in results.results} - {OURS}):
                other = results.whole(target, system)
                if own and other and own.value != other.value and target.reached(other.value, own.value):
                    lines.append(f"{target.label}: {system} does better, {shown(other)} to {shown(own)}")
    if inputs.icl is not None:
        rows = [row for row in inputs.icl.rows if row.part != "D"]
        if failed := [row.name for row in rows if not is_learnt(row)]:
            lines.append(f"Not learnt from shots, {len(failed)} of {len(rows)}: {', '.join(failed)}")
    if never := [name for name, task in TASKS.items() if task.listens and name not in settings.tasks]:
        lines.append(f"Not trained: {', '.join(never)}")
    lines.append(
        f"It hears at most {settings.max_audio_seconds:g} s at once: nothing beyond a cut helps to understand it"
    )
    if share := synthetic_share(inputs):
        lines.append(f"It knows the voices and topics of its data: {share.strip().rstrip('.')}")
    return "".join(f"- {line}.\n" for line in lines)


def fault(results: Evaluation, target: Target) -> str:
    return f"{NAMES[target.metric]} {shown(results.whole(target))}, asked for {target.at_least:g}"


def licence_text(inputs: Inputs) -> str:
    heard, table = inputs.heard(), inputs.licences
    if not heard:
        return (
            "The code is under Apache-2.0. What the weights may be used for depends on their training data, which are "
            "not known here: the section on data names the command that tells.\n"
        )
    parts = ["The code is under Apache-2.0."]
    named = {
        use: ", ".join(f"{table.entry(name).title} ({table.entry(name).licence})" for name in table.used(heard, use))
        for use in ("noncommercial", "research")
    }
    if named["noncommercial"]:
        parts.append(f"**Use of these weights should be non-commercial**: they learnt from {named['noncommercial']}.")
    if named["research"]:
        parts.append(
            f"For research, or with no licence stated: {named['research']}; use of the weights should respect that."
        )
    if not any(named.values()):
        parts.append(
            "So are the weights: nothing that they learnt from restricts their use; attribution as in the table."
            if inputs.all_heard_known
            else "What is known of their training data does not restrict what the weights may be used for; the rest is "
            "not known here."
        )
    return " ".join(parts) + "\n"

"""Finished runs as a table for analysis in Python."""

from pathlib import Path

import pandas as pd

from noisysam.core.errors import UserError
from noisysam.report.tables import as_line, flat_cell, mark_beside, read_cells
from noisysam.runs.measures import MEASURES
from noisysam.runs.record import RunFolder

COLUMNS = {  # of `results` and of results.csv; tests hold them against both
    "row": "row of the study; without a study, the run's name",
    "noise_type": "noise type",
    "noise": "nominal noise rate, a share of 1",
    "seed": "training seed",
    "key": "the run's key",
    "status": "finished, failed, running, interrupted, damaged or missing",
    "error": "why a run failed",
    "m": "rows that share one perturbation, or batch",
    "rho": "radius of the perturbation",
    "oracle": "what of the true noise, of clean labels or of the test set the run used; empty: blind",
    "flip_rate": "measured share of wrong training labels",
    "labels": "digest of the noisy labels",
    "method": "method",
    "opt": "optimizer",
    "method_option.NAME": "an option of the method, such as method_option.alpha",
    "opt_option.NAME": "an option of the optimizer, apart from m and rho",
    "plugin": "file of the user's own components",
    "dataset": "data set",
    "data": "digest of the data set",
    "train": "training images",
    "val": "images held out with their noisy labels",
    "test": "test images",
    "train_subset": "class-balanced number of training images that was asked for",
    "subset_seed": "seed of their choice",
    "augment": "augmentation",
    "noise_draw": "exact or bernoulli",
    "model": "network",
    "parameters": "its number of parameters",
    "base_opt": "the rule that takes the step",
    "lr": "peak learning rate",
    "momentum": "momentum",
    "nesterov": "whether it is Nesterov's",
    "weight_decay": "weight decay",
    "schedule": "learning rate schedule",
    "warmup": "epochs of warm-up",
    "batch": "images per step",
    "epochs": "epochs of each stage",
    "eval_every": "epochs between evaluations",
    "precision": "fp32 or bf16",
    "device": "device",
    "device_name": "its name",
    "threads": "threads",
    "commit": "commit of noisysam, with + where its files differed",
    "torch": "version of PyTorch",
    "cpu": "model of the CPU",
    "instruction_set": "its instruction sets that matter",
    "numerics": "numerics revision",
    "machine": "hardware and numerics revision that decide the bits of a result",
    "beside_others": "whether the run shared its kind of CPU with another run of the study at the same time",
    "sparse": "whether it was evaluated less often than every tenth of the run: then selected and best are empty",
    "collapsed": "whether nearly all test images were predicted as one class; empty where that is not known",
    "search_trials": "trials with which its row was tuned on noisy validation labels; empty: a study without search",
    "started": "start, UTC",
    "ended": "end, UTC",
    **{m.name: f"{m.title[0].lower()}{m.title[1:]}" for m in MEASURES if m.result},
    "best_epoch": "epoch of the best test accuracy, from 0",
    "selected_epoch": "epoch that was selected, from 0",
    "steps": "optimizer steps, all stages",
    "skipped_steps": "steps that were skipped as a gradient was not finite",
    "forward_samples": "images in forward passes, all stages",
    "gradient_samples": "images in gradient evaluations, all stages",
    "train_seconds": "seconds of training",
    "eval_seconds": "seconds of evaluation",
    "log_seconds": "seconds of writing",
    "compile_seconds": "seconds of compilation",
    "images_per_second": "images of the training set per second of training",
    "gradient_evaluations": "gradient evaluations per image that was drawn",
    "forward_evaluations": "forward passes per image that was drawn",
}


def results(study: str | None = None, store: Path | str = "runs") -> pd.DataFrame:
    """A DataFrame with a line for each run of a study, or of everything in a store: its settings, noise, results
    (shares of 1) and cost. Runs without results have empty fields; see the column ``status``.

    ``study``: the name of a study in the store. ``UserError`` where there is no such study or nothing in the store.
    """
    store = Path(store)
    if study is not None:
        cells = read_cells(store, study)
    else:
        folders = [RunFolder(store, path.parent.name) for path in sorted(store.glob("*/record.json"))]
        records = [record for folder in folders if (record := folder.sound_record) is not None]
        plan = [
            {"row": r["name"], "key": r["key"], "config": r["config"], **{n: r["config"][n] for n in ("noise", "seed")}}
            for r in records
        ]
        found = [{**record, "collapsed": RunFolder(store, record["key"]).collapsed} for record in records]
        cells = mark_beside([flat_cell(c, "", record) for c, record in zip(plan, found, strict=True)])
    if not cells:
        raise UserError(f"there is no run in {store}: train one, or import records")
    return pd.DataFrame(list(map(as_line, cells)))

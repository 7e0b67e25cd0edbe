"""Options that several commands have: type and help of each stand once, here; a command adds its default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# What is read.
Backbone = Annotated[Path, typer.Option(help="backbone folder, from `buddy backbone`, or its name in a study")]
Run = Annotated[Path, typer.Option(help="run folder")]
RunOrBackbone = Annotated[Path, typer.Option(help="run folder, or a backbone folder for the dense model")]
Corpus = Annotated[Path, typer.Option(help="prose: a data set folder from `buddy data`, or a text file")]
Prompts = Annotated[Path, typer.Option(help="prompts: a data set folder from `buddy data` (alpaca, samsum)")]
TaskData = Annotated[Path, typer.Option(help="folder of data sets, one folder per task, from `buddy data`")]
GivenStudy = Annotated[str, typer.Option(help="study: its name, or its folder")]
Results = Annotated[Path, typer.Option(help="folder that holds the studies")]

# What is written.
Folder = Annotated[Path, typer.Option(help="folder to make")]
RunOut = Annotated[Path, typer.Option(help="run folder to write")]
RecordOut = Annotated[Path | None, typer.Option(help="record to write (JSON)")]
RecordsOut = Annotated[Path, typer.Option(help="folder for the records: removed~N.json")]
TrainingRecord = Annotated[Path | None, typer.Option(help="training record to write (JSON)")]

# What it is called.
Study = Annotated[str, typer.Option(help="study it belongs to")]
StudyOfRun = Annotated[str, typer.Option(help="study it belongs to; the run's by default")]
StudyIfAny = Annotated[str, typer.Option(help="study it is for: logs a W&B run; none without")]
Name = Annotated[str, typer.Option(help="the backbone's name in the study; its folder's name by default")]
NameIfDense = Annotated[str, typer.Option(help="the backbone's name, for a dense model")]

# How.
Removed = Annotated[str, typer.Option(help="numbers of removed blocks, one record each, such as 0,4,8")]
AutoBudget = Annotated[
    str,
    typer.Option(help="auto or auto:PRICE: in place of --removed, the run's budget predictor sets each input's depth"),
]
RemovedAtOnce = Annotated[str, typer.Option(help="numbers of removed blocks, such as 4,8,12,16")]
WindowSeed = Annotated[
    int | None,
    typer.Option(help="draw the windows at random with this seed; the first ones without", min=0, max=2**32 - 1),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16")]

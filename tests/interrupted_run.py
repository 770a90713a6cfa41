"""What `test_transformers_versions.py` runs with another transformers: `interrupted_run.py FOLDER`.

One run of the job in `FOLDER/job.json` is undisturbed; another is stopped after its fourth step and resumed.
"""

import contextlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
import transformers

from gossamer.errors import Interrupted
from gossamer.job.processes import is_first, num_processes
from gossamer.job.report import Event
from gossamer.stages.pretrain import Pretrain, pretrain


def press_control_c(event: Event) -> None:
    if event.done == 4:
        os.kill(os.getpid(), signal.SIGINT)


def main(folder: Path) -> None:
    options = json.loads((folder / "job.json").read_text())
    job = Pretrain(**options | {"dataset": tuple(options["dataset"])})
    if num_processes() > 1:
        dist.init_process_group("gloo")
    whole = pretrain(replace(job, output_dir=str(folder / "whole")))
    stopped = replace(job, output_dir=str(folder / "resumed"))
    with contextlib.suppress(Interrupted):
        pretrain(stopped, press_control_c)
    resumed = pretrain(replace(stopped, resume=True))
    assert resumed.losses == whole.losses
    if is_first():
        found = {"version": transformers.__version__, "losses": whole.losses}
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(Path(sys.argv[1]))

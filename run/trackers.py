"""--report tensorboard,wandb: each line of metrics.jsonl also goes to these trackers, through their own packages.

A resumed run continues its curves. TensorBoard forgets the steps after the last save, which are taken again. wandb has them
already and keeps them: the repeated steps are the same.
"""
import contextlib
import dataclasses
import importlib.util
import uuid

from errors import UserError
from files import writing
from files.json_files import is_there


def check(report: str | None):
    """Raises UserError for a tracker that is not known, or whose package is not installed."""
    for name in report.split(",") if report is not None else ():
        if name not in TRACKERS:
            raise UserError(f"--report {report}: {name or 'nothing'} is no tracker; there are {' and '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report {name}: the package is not installed; pip install {name}")


@contextlib.contextmanager
def opened(run):
    """`with opened(run):` run.log(line) also sends the line to the trackers of --report. Raises UserError."""
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(run.cfg.report.split(",") if run.cfg.report else ()):
            try:
                tracker = TRACKERS[name](run)
            except Exception as e:  # of another program: no account, no network, no space
                raise UserError(f"--report {name}: {str(e).strip() or type(e).__name__!s}".splitlines()[0]) from None
            run.trackers.append(stack.enter_context(tracker))
        yield


class TensorBoard:
    """Curves for `tensorboard --logdir OUT`, in OUT/tensorboard."""

    def __init__(self, run):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(run.out / "tensorboard", purge_step=run.step + 1 if run.cfg.resume else None)

    def __enter__(self):
        return self

    def __call__(self, line: dict):
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name, value, line["step"])

    def __exit__(self, *error):
        self.writer.close()


class WandB:
    """Project bytewise. OUT/wandb/id.txt has the run's id, with which a resumed run finds its curves."""

    def __init__(self, run):
        import wandb
        path = run.out / "wandb" / "id.txt"
        if not is_there(path):
            writing.write_text(path, uuid.uuid4().hex[:8])
        self.run = wandb.init(project="bytewise", name=run.out.name, id=path.read_text().strip(), resume="allow",
                              dir=str(run.out), config=dataclasses.asdict(run.cfg))

    def __enter__(self):
        return self

    def __call__(self, line: dict):
        self.run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def __exit__(self, *error):
        self.run.finish(exit_code=1 if error[0] else 0)


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}

"""Several tasks in one run: --task-column names the column that says which task a row is of, and each task has an adapter.

One base model and one pass over mixed batches; each example goes through the adapter of its task alone (methods/several.py).
With --shared-adapter it goes through a second one too, which learns from all tasks:

    y[i] = W x[i] + s B_t A_t x[i] + s B A x[i]           t: the task of row i

Each adapter learns as in a run of its own. There, a step's loss is divided by the labelled tokens of that task in the step,
n_t, and not by those of the whole step, n. So after backward the gradients of task t are multiplied by n / n_t. The shared
adapter's are not: it has all n tokens. (--clip still goes by the norm of all adapters together.)

adapter/ and best/ have a folder for each adapter, as PEFT writes several adapters. The predicted peak is that of the
largest micro-batch. With --amp, another one with more tasks in it can need 16-bit copies of one adapter more: some kB.
"""
import torch
from torch import nn

import data
from errors import UserError
from files import rows
from files.json_files import show
from methods import several

SHARED = "shared"


def read(source: rows.Source, column: str, n_rows: int) -> list[str]:
    """The task of each row of a file, of the first n_rows. Raises UserError, which names the row, for one without a task."""
    if rows.kind_of(source.path) == ".txt":
        raise UserError(f"--task-column {column}: {source.path} is plain text, which has no columns")
    found = []
    for where, raw in rows.Rows(source.path):
        if len(found) == n_rows:
            break
        task = rows.parse(where, raw).get(column)
        if not isinstance(task, (str, int)) or isinstance(task, bool) or task == "":
            raise UserError(f"{where}: --task-column {column}: expected the name of a task, found {show(task)}")
        try:
            several.check_name(str(task))
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        found.append(str(task))
    return found


def split(parts: list[data.Part], tasks: list[list[str]], weights: list[float] | None = None):
    """(parts, weights), each part cut into one for each task. tasks: of each part's file, the task of each row."""
    made = []
    for part, of_row, weight in zip(parts, tasks, weights or [1.0] * len(parts)):
        for task in sorted(set(of_row)):
            mine = part.rows & torch.tensor([t == task for t in of_row])
            if mine.any():
                made.append((data.Part(part.file, mine, part.examples & mine[part.file.rows], task), weight))
    return [part for part, _ in made], [weight for _, weight in made]


def names(train: data.Dataset, held_out: list[data.Dataset], column: str, shared: bool) -> tuple[str, ...]:
    """The adapters of a run. Raises UserError for a task that nothing is trained on, and for a single one."""
    found = train.tasks
    for task in found:
        if not any(p.examples.any() for p in train.parts if p.task == task):
            raise UserError(f"--task-column {column}: none of task {task}'s rows has a token to learn (empty replies, or "
                            f"--max-length cuts them off)")
    if len(found) < 2:
        raise UserError(f"--task-column {column}: every row is of task {found[0]}; leave it out, and one adapter is trained")
    if shared and SHARED in found:
        raise UserError(f"--shared-adapter: a task is named {SHARED} too; rename it")
    for val_set in held_out:
        for task in sorted(set(val_set.tasks) - set(found)):
            raise UserError(f"--task-column {column}: task {task} has held-out rows and none to train on")
    return (*found, SHARED) if shared else found


def adapters_of(model: nn.Module, task: str | None) -> tuple[str, ...]:
    shared = [SHARED] if SHARED in several.names(model) and task != SHARED else []
    return (task, *shared) if task else ()


def route(model: nn.Module, tasks: list | None, segments: list[int] | None = None):
    """Example i of the next forwards goes through the adapter of tasks[i]. None: the run has no tasks."""
    if tasks:
        several.route(model, [adapters_of(model, t) for t in tasks], segments)


def weigh(model: nn.Module, batches: list, master):
    """Multiply the gradients of each task's adapter by n / n_t. master: that of the optimizer, p -> what it updates."""
    counts = {}
    for batch in batches:
        for task, n in zip(batch.tasks or (), batch.labels_of or ()):
            counts[task] = counts.get(task, 0) + n
    for task, n in counts.items():
        for m in several.of(model, task).values():
            for p in m.parameters():
                if p.requires_grad and (grad := master(p).grad) is not None:
                    grad.mul_(sum(counts.values()) / n)

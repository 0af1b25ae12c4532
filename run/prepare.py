"""What a run needs before its first step: the data, the options that depend on it, the model, the optimizer."""
import itertools
from pathlib import Path

import torch
from torch import nn

import data
import lora
from errors import UserError
from files import conversations, fingerprint, peft_files, rows, weights
from files.json_files import show
from methods import bottleneck, dora, ia3, prefix, prompt, several
from run import tasks
from run.options import TrainConfig
from run.plan import Plan
from techniques.device import compute_dtype, device_of
from techniques.optim import OPTIMIZERS, AdamW

LOOKED_AT = 1000  # rows of each file that --show-batch reads


def read_data(cfg: TrainConfig):
    """(tokenizer, template, training set, {name: held-out set}). The first held-out set is the main one."""
    tokenizer = data.load_tokenizer(cfg.model)
    template = data.load_template(cfg.template, tokenizer)
    columns = conversations.parse_columns(cfg.columns)

    def read(source: rows.Source) -> data.Examples:
        limit = LOOKED_AT if cfg.show_batch else None
        tokens = data.read_tokens(source.path, tokenizer, template, columns, cfg.skip_bad_rows, not cfg.no_cache, limit)
        tokens.unused.pop(f"column {show(cfg.task_column)}", None)
        say_what_is_not_used(source.path, tokens)
        return data.Examples(tokens, cfg.max_length)
    sources = rows.sources(cfg.data)
    files, weights_ = [read(s) for s in sources], [s.weight for s in sources]

    def dataset(parts: list, sources: list, name: str, weights_: list | None = None) -> data.Dataset:
        if cfg.task_column:
            of_rows = [tasks.read(s, cfg.task_column, len(p.file.tokens)) for s, p in zip(sources, parts)]
            parts, weights_ = tasks.split(parts, of_rows, weights_)
        return data.Dataset(parts, weights_, cfg.seed, name)

    if cfg.val_data:
        train_set = dataset([f.part() for f in files], sources, cfg.data, weights_)
        val_sets = {name: dataset([read(s).part()], [s], str(s.path)) for name, s in val_sources(cfg.val_data).items()}
    else:
        is_text = [rows.kind_of(s.path) == ".txt" for s in sources]
        train_parts, val_parts = data.split(files, cfg.val_frac, cfg.seed, is_text)
        train_set = dataset(train_parts, sources, cfg.data, weights_)
        val_sets = {"held-out": dataset(val_parts, sources, f"the held-out rows of {cfg.data}")}
    if cfg.show_batch and max(map(len, (f.tokens for f in files))) == LOOKED_AT:
        print(f"--show-batch looks at the first {LOOKED_AT:,} rows of a file; the run's first micro-batch may be another")
    if line := train_set.what_is_cut():
        print(line)
    if cfg.eval_examples and cfg.eval_examples > (most := max(map(len, val_sets.values()))):
        raise UserError(f"--eval-examples {cfg.eval_examples}: only {most} examples are held out; leave it out")
    return tokenizer, template, train_set, val_sets


def tasks_of(cfg: TrainConfig, train_set, val_sets: dict) -> tuple[str, ...]:
    """The names of the adapters with --task-column; none without. Raises UserError."""
    return tasks.names(train_set, list(val_sets.values()), cfg.task_column, cfg.shared_adapter) if cfg.task_column else ()


def val_sources(val_data: str) -> dict[str, rows.Source]:
    """The held-out files by their names in metrics.jsonl: "a" for a.jsonl, "a-2" for a second one. Raises UserError."""
    files = {}
    for source in rows.sources(val_data):
        if source.weight != 1:
            raise UserError(f"--val-data {val_data}: a held-out file has no weight")
        name = stem = source.path.name.partition(".")[0] or source.path.name
        for n in itertools.count(2):
            if name not in files:
                break
            name = f"{stem}-{n}"
        files[name] = source
    return files


def say_what_is_not_used(path, tokens: data.Tokens):
    if tokens.unused:
        print(f"{path.name}: not used: " + ", ".join(f"{name} of {n:,} rows" for name, n in sorted(tokens.unused.items())))
    if tokens.bad:
        first = "; ".join(tokens.reasons)
        print(f"{path.name}: {tokens.bad:,} bad rows skipped, {len(tokens):,} are left. The first: {first}")


def inputs(cfg: TrainConfig, template: str) -> dict:
    """Hashes of what the run is made from (files/fingerprint.py), for its config.json. --resume compares them."""
    folder = weights.find(cfg.model)
    return {"data": of_files(cfg.data), "val_data": cfg.val_data and of_files(cfg.val_data),
            "template": fingerprint.of_text(template), "tokenizer": fingerprint.of_tokenizer(folder),
            "adapter": cfg.adapter and fingerprint.of_adapter(Path(cfg.adapter)),
            "weights": None if cfg.from_scratch else fingerprint.of_weights(folder)}


def of_files(spec: str):
    """The hash of a data file; of several files a list of them."""
    hashes = [fingerprint.of_file(s.path) for s in rows.sources(spec)]
    return hashes if len(hashes) > 1 else hashes[0]


def plan_steps(train_set: data.Dataset, cfg: TrainConfig) -> Plan:
    return Plan(train_set, cfg.batch_size, cfg.grad_accum, cfg.seed, cfg.pack, cfg.virtual_tokens or 0)


def resolve_steps(cfg: TrainConfig, plan: Plan):
    """Fill in the options that depend on the number of examples. Raises UserError."""
    cfg.steps = cfg.steps or cfg.epochs * plan.steps_per_epoch
    cfg.warmup_steps = cfg.steps // 20 if cfg.warmup_steps is None else cfg.warmup_steps
    if cfg.warmup_steps >= cfg.steps:
        raise UserError(f"--warmup-steps {cfg.warmup_steps}: the run has {cfg.steps} steps, the full rate is never reached")
    cfg.eval_every = cfg.eval_every or plan.steps_per_epoch
    cfg.save_every = cfg.save_every or cfg.eval_every
    if cfg.sample_every and cfg.sample_every >= cfg.steps:
        raise UserError(f"--sample-every {cfg.sample_every}: there are {cfg.steps} steps, nothing is sampled before the end")


def load_model(cfg: TrainConfig) -> nn.Module:
    """The model. Every weight that is not trained is frozen."""
    torch.manual_seed(cfg.seed)
    if cfg.full and cfg.optimizer == "offload_adamw":  # its masters are float32 on the CPU, and are made from these weights
        device, bits = "cpu", 32
    else:
        device, bits = cfg.device, cfg.bits
    if cfg.from_scratch:
        model = weights.from_scratch(cfg.model, device, cfg.seed)
    else:
        model = weights.load(cfg.model, bits, device, compute_dtype(cfg.device, cfg.amp))
    init = "default" if cfg.resume else cfg.lora_init  # a resumed run reads the start of its adapters from its state
    set_trainable(model, cfg, init)
    if cfg.ckpt_offload and not device_of(cfg.device).own_memory:
        print(f"--ckpt-offload: on {cfg.device} host and device memory are the same; nothing moves, nothing is saved")
    return model


def set_trainable(model: nn.Module, cfg: TrainConfig, init: str = "default", like: dict | None = None):
    """Set what is trained (adapters, or every weight) and which layers are recomputed.

    like: for a prediction of --adapter, its modules by layer: new ones of the same shape are trained.
    """
    if cfg.full:
        model.requires_grad_(True)
    elif like and cfg.method == "ia3":
        ia3.put(model, {n: ia3.IA3Linear(model.get_submodule(n), m.on_input, m.parts) for n, m in like.items()})
    elif like:
        model.requires_grad_(False)
        for name, m in like.items():
            base = model.get_submodule(name)
            lora.replace(model, name, type(m)(base, m.r, m.alpha, cfg.lora_dropout, m.rslora, m.parts))
    elif cfg.adapter:
        for m in lora.adapters(peft_files.load(model, cfg.adapter)).values():
            m.dropout = cfg.lora_dropout
    elif cfg.method in ("lora", "dora"):
        targets = cfg.lora_targets.split(",") if cfg.lora_targets else None
        shape = (cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, targets, cfg.rslora)
        if cfg.task_column:
            several.inject(model, cfg.tasks, *shape)
        elif cfg.method == "dora":
            dora.inject(model, *shape)
        else:
            lora.inject(model, *shape, init, weights.StoredWeights(cfg.model).read if init != "default" else None)
    elif cfg.method == "ia3":
        ia3.inject(model)
    elif cfg.method == "bottleneck":
        bottleneck.inject(model, cfg.bottleneck)
    else:
        {"prompt": prompt, "prefix": prefix}[cfg.method].inject(model, cfg.virtual_tokens, first_words(cfg))
    model.ckpt_every, model.ckpt_offload = cfg.ckpt_every, cfg.ckpt_offload


def first_words(cfg: TrainConfig) -> list[int] | None:
    """--virtual-init: the ids that virtual tokens start from. Raises UserError.

    Words: drawn from the ids 300 to 5,299 (Lester et al., section 3.2, draw from the 5,000 most frequent words too). Before
    them a vocabulary has its special tokens and its single bytes: GPT-2 256 of them, LLaMA 2 259, SmolLM2 273. Then come its
    merges in the order in which they were learned, so these are frequent words and pieces of words.
    """
    if cfg.virtual_init == "random":
        return None
    tokenizer = data.load_tokenizer(cfg.model)
    if cfg.virtual_init == "words":
        model_config, _, _ = weights.read_config(weights.find(cfg.model))
        rng, most = torch.Generator().manual_seed(cfg.seed), min(5300, tokenizer.vocab_size, model_config.vocab_size)
        return torch.randint(min(300, most // 2), most, (cfg.virtual_tokens,), generator=rng).tolist()
    ids = tokenizer.encode(cfg.virtual_init)
    if not ids:
        raise UserError("--virtual-init: the text is empty; give words, random, or a text such as 'Answer politely:'")
    return ids


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> AdamW:
    """--optimizer for everything that is trained. Norms and biases get no weight decay.

    --lora-plus: B learns faster than A (LoRA+, Hayou et al., arXiv:2402.12354, section 4): A is random and already of the
    right size, while B starts at 0. Each group has its learning rate as a multiple of the run's, "times".
    """
    fast = {p for m in lora.adapters(model).values() for p in m.lora_B} if cfg.lora_plus else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2 and p not in fast], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    if fast:
        groups.append({"params": [p for p in trained if p in fast], "weight_decay": cfg.weight_decay,
                       "times": cfg.lora_plus})
    if cfg.optimizer != "offload_adamw":
        return OPTIMIZERS[cfg.optimizer](groups, cfg.lr)
    dtype = device_of(cfg.device).half if cfg.full and cfg.bits == 16 else torch.float32
    return OPTIMIZERS[cfg.optimizer](groups, cfg.lr, device=cfg.device, dtype=dtype)


def make_scaler(cfg: TrainConfig) -> torch.amp.GradScaler:
    """For float16: its smallest normal number is 6e-5, and many gradients are smaller. For other types it does nothing.

    The loss is multiplied by a large number, the scale, and the gradients are divided by it before they are clipped.
    When a gradient overflows, the step is skipped and the scale is halved.
    """
    half = compute_dtype(cfg.device, cfg.amp) == torch.float16
    return torch.amp.GradScaler(torch.device(cfg.device).type, enabled=half)

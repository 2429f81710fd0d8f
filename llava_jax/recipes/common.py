"""Every option of a run: its default, its meaning and the values it may have. Recipes start from `get_config()`.

A recipe, or `--config.KEY=VALUE` on the command line, sets an option to another value of the same type.
"""

from ml_collections import ConfigDict

from llava_jax.recipes.options import Option, Section, flatten

DTYPES = ("", "float32", "bfloat16")


def _declare() -> Section:
    """Each option as an `Option` or, if it has no constraint, as its default."""
    config = Section()

    # ---- The model

    # What is trained: "pretrain" (stage 1: the projector) or "finetune" (stage 2: projector and language model).
    config.stage = Option("pretrain", choices=("pretrain", "finetune"))
    # The checkpoint to start from: the output of `convert import`, or the workdir of an earlier stage.
    config.init = ""
    # The preset whose shapes the checkpoint must have ("" allows any): see llava_jax/models/config.py.
    config.model = Option("", changeable=True)
    # The preset that preflight compiles if neither `model` nor `init` is set.
    config.default_model = Option("", changeable=True)
    # The chat template: see llava_jax/data/templates.py.
    config.template = "v1"
    # The position of an image in its turn: "first", "as_is" or "random" ([Xq, Xv] or [Xv, Xq], as in the paper).
    config.image_position = Option("first", choices=("first", "as_is", "random"))
    # How images are made square: "square" (center crop), "pad", "resize"; or "anyres": several squares of each, its
    # tiles (docs/anyres.md). "" as in the checkpoint.
    config.image_aspect = Option("", choices=("", "square", "pad", "resize", "anyres"))
    # Of "anyres"; by default as in the checkpoint or, if it has none, as in LLaVA-1.6.
    config.anyres = Section()
    # Rows and columns of tiles, as ((1, 2), (2, 1), (2, 2)); of grids that fit an image equally well the first counts.
    config.anyres.grids = ()
    config.anyres.merge = Option("", choices=("", "spatial_unpad", "spatial", "flat"))  # the order of the features
    # What images of a sample with several get: their "tiles", or the "base" alone.
    config.anyres.several = Option("", choices=("", "tiles", "base"))
    # Seed of the order of the data and of random image positions.
    config.seed = Option(0, minimum=0)

    # ---- The data

    config.data = Section()
    # A LLaVA JSON or JSONL file, and the folder that its image names are relative to. It may also be a YAML file of
    # LLaVA-NeXT that names several, or Parquet, which needs no folder if images are inside (docs/data.md).
    config.data.json = ""
    config.data.images = ""
    # Instead of both: a data set made by `llava_jax.data.build`.
    config.data.built = ""
    # Instead of all three: several data sets, each with a weight, the number of passes over it in an epoch (1 by
    # default): ({"json": "a.json", "images": "a"}, {"built": "b", "weight": 0.5}).
    config.data.mixture = ()
    # Whether images, those of `evaluate` included, may have absolute names. Otherwise they must be in their folder.
    config.data.allow_absolute_images = Option(False, changeable=True)
    # Samples held out for the validation loss, chosen by the seed.
    config.data.holdout = Option(0, minimum=0)
    # What a faulty sample is: an "error", or a "skip": it keeps its place in the batch, but has no loss tokens.
    config.data.on_bad_sample = Option("error", choices=("error", "skip"), changeable=True)
    # With "skip": the largest share of faulty samples, of those seen so far. A run with more stops.
    config.data.max_bad_share = Option(0.01, minimum=0, maximum=1, changeable=True)
    # Processes that read data; 0 reads in threads of the training process.
    config.data.workers = Option(0, minimum=0, changeable=True)

    # ---- Batches

    # Positions of a sample, images included: longer samples are truncated (never inside an image).
    config.max_length = Option(2048, minimum=1)
    # Pack several samples into a row, isolated from each other (docs/batches.md). A step then has more than
    # batch_rows samples.
    config.pack = False
    # Positions of a packed row; 0 is max_length.
    config.row_length = Option(0, minimum=0)
    # Make steps whose samples all have images, or none, like the original's group_by_modality_length (docs/batches.md).
    config.group_by_modality = False
    # Rows of a step, over all devices. Without packing, a row is a sample.
    config.batch_rows = Option(128, minimum=1)
    # Rows of a group. The rows of a group share its image slots.
    config.rows_per_group = Option(1, minimum=1)
    # Image slots of a group; 0 plans the fewest that suffice or, for packed rows, the number that leaves the least
    # padding. Data without images needs none: -1 says so where there is no data to plan from, as in preflight.
    config.image_slots = Option(0, minimum=-1)
    # Label slots of a group (positions whose next token is a target); 0 plans the fewest that suffice.
    config.label_slots = Option(0, minimum=0)
    # The most rows on a device at once: larger batches are accumulated from microbatches. 0 sets no limit.
    config.max_rows_per_device = Option(0, minimum=0, changeable=True)
    # Devices by axis; one may be -1: all that remain. Rows are sharded over data x fsdp, parameters over fsdp x tensor:
    # fsdp gathers a layer's parameters when it is computed, tensor splits the computation of each layer.
    config.mesh = Section()
    config.mesh.data = Option(1, changeable=True)
    config.mesh.fsdp = Option(-1, changeable=True)
    config.mesh.tensor = Option(1, changeable=True)

    # ---- The optimizer

    config.epochs = Option(1.0, minimum=0)  # fractions are rounded up to whole steps
    config.steps = Option(0, minimum=0)  # overrides epochs unless 0
    config.learning_rate = Option(2e-5, minimum=0)
    # Of the groups "projector" and "vision"; 0 means learning_rate.
    config.projector_learning_rate = Option(0.0, minimum=0)
    config.vision_learning_rate = Option(0.0, minimum=0)
    config.warmup_ratio = Option(0.03, minimum=0, maximum=1)  # of all steps, linear; then the schedule
    # After the warmup: "cosine" or "linear" to the minimum, "constant", or "wsd": constant, then a decay
    # (docs/optimizers.md).
    config.schedule = "cosine"
    config.min_learning_rate_ratio = Option(0.0, minimum=0, maximum=1)  # the minimum, of the peak
    config.decay_ratio = Option(0.1, minimum=0, maximum=1)  # of all steps, the last, in which "wsd" decays
    config.decay_shape = Option("cosine", choices=("cosine", "linear", "1-sqrt"))  # of "wsd"
    # "adamw", "adafactor", "lion" or "muon" (docs/optimizers.md).
    config.optimizer = "adamw"
    config.weight_decay = Option(0.0, minimum=0)  # of matrices; never of biases and norms
    config.beta1 = Option(0.9, minimum=0, below=1)  # of AdamW, and the next two
    config.beta2 = Option(0.999, minimum=0, below=1)
    config.epsilon = Option(1e-8, minimum=0)
    # The type of the first moments: "" is float32; "bfloat16" halves them.
    config.moment_dtype = Option("", choices=("", "bfloat16"))
    config.adafactor = Section()
    config.adafactor.decay = Option(0.8, minimum=0, maximum=1)  # the second moment's is 1 - step ** -decay
    config.adafactor.clip = Option(1.0, minimum=1)  # of the root mean square of a matrix's update
    config.adafactor.scale_parameter = False  # multiply updates by the root mean square of their parameter
    config.adafactor.min_factored = Option(128, minimum=1)  # narrower matrices keep their whole second moment
    config.lion = Section()
    config.lion.beta1 = Option(0.9, minimum=0, below=1)
    config.lion.beta2 = Option(0.99, minimum=0, below=1)
    config.muon = Section()  # of matrices; the rest is trained by AdamW
    config.muon.momentum = Option(0.95, minimum=0, below=1)
    # The root mean square of updates, near that of AdamW; 0 scales them by sqrt(max(1, outputs / inputs)) instead.
    config.muon.rms = Option(0.2, minimum=0)
    config.clip_norm = Option(0.0, minimum=0)  # of the gradient of all trained parameters; 0 is off
    # The decay of an exponential moving average of the trained parameters, such as 0.999; 0 is off. What is evaluated,
    # and what other commands read from the workdir, is then the average.
    config.ema = Option(0.0, minimum=0, below=1)
    # What is trained, instead of what `stage` trains: pairs of a pattern (a regular expression that matches the
    # beginning of a parameter's name) and either options or the name of a group, which has the learning rate that the
    # stages give it: "projector", "vision", "llm" or "lora". Options are `learning_rate` and `weight_decay`, by default
    # those above; `layers`, those of a stack that are trained ("16:", ":8", "-4:"); `layer_decay`, by which the rate of
    # each layer is smaller than that of the next. The first pattern that matches counts; a parameter that none matches
    # is frozen. For example, norms, and the tower from layer 12 on (docs/tuning.md):
    # ((r"llm\..*norm", "llm"), (r"vision\.", {"learning_rate": 2e-6, "layers": "12:"})).
    config.trainable = ()

    # Low-rank adapters (LoRA) of linear layers, which are trained instead of these layers' weights (docs/tuning.md).
    config.lora = Section()
    config.lora.rank = Option(0, minimum=0)  # 0 is off
    # The adapter's product is multiplied by alpha / rank; 0 is twice the rank, as published.
    config.lora.alpha = Option(0.0, minimum=0)
    config.lora.dropout = Option(0.0, minimum=0, maximum=0.999)  # of the adapters' inputs
    # Layers with an adapter, by patterns (regular expressions) of the end of their names in the language model, as
    # ("q_proj", "v_proj"), or of whole names anywhere, as (r"vision\.layers\..*_proj",).
    config.lora.targets = (r"llm\.layers\..*_proj",)
    config.lora.rslora = False  # multiply by alpha / sqrt(rank) instead
    config.lora.dora = False  # train the length of each column of the adapted weights, too

    # ---- The computation

    # Types of the computation and of frozen parameters; "" is bfloat16 on accelerators and, on CPUs, float32 and the
    # type of the checkpoint. Trained parameters are float32.
    config.compute_dtype = Option("", choices=DTYPES)
    config.frozen_dtype = Option("", choices=DTYPES)
    # The type of frozen weights of the language model: "bfloat16", or "int8" or "nf4" to train adapters on quantized
    # linear layers (docs/quantization.md); "" is that of a checkpoint that is quantized, or else frozen_dtype.
    config.base_dtype = Option("", choices=("", "bfloat16", "int8", "nf4"))
    # Activations kept for the backward pass: "none" recomputes nothing, "full" every layer, "save_qkv" all but queries,
    # keys and values; "offload" is "full" with what it keeps in the memory of the host.
    config.remat = Option("full", choices=("none", "full", "save_qkv", "offload"), changeable=True)
    # The attention backend: "xla", "chunked", "splash" (TPU), "cudnn" (GPU); "" is the fastest that is correct.
    config.attention = Option("", choices=("", "xla", "chunked", "splash", "cudnn"), changeable=True)
    # The directory of the compilation cache, local or gs://, shared by runs; "" keeps no compiled programs.
    config.compilation_cache = Option("", changeable=True)

    # ---- What a run writes

    config.log_every = Option(1, minimum=1, changeable=True)  # steps
    # Steps between validation losses; 0 only after the last step. Needs data.holdout.
    config.eval_every = Option(0, minimum=0, changeable=True)
    # A benchmark of `evaluate score` that is answered before the first step, every `every` steps (0: not in between)
    # and after the last step: the files of its questions and labels, the folder of its images ("" if they are inside
    # the file), and the number of questions, which the seed chooses (docs/evaluation.md). "" is none.
    config.evaluate = Section()
    config.evaluate.benchmark = Option("", changeable=True)
    config.evaluate.questions = Option("", changeable=True)
    config.evaluate.labels = Option("", changeable=True)
    config.evaluate.images = Option("", changeable=True)
    config.evaluate.limit = Option(64, minimum=1, changeable=True)
    config.evaluate.every = Option(0, minimum=0, changeable=True)
    config.save_every = Option(500, minimum=1, changeable=True)  # steps
    config.keep = Option(2, minimum=1, changeable=True)  # newest checkpoints
    # Trace this many steps, beginning with `start`, to profile/ in the workdir (tensorboard --logdir). 0 steps is off.
    config.profile = Section()
    config.profile.start = Option(10, minimum=1, changeable=True)
    config.profile.steps = Option(0, minimum=0, changeable=True)
    # Weights & Biases in addition to TensorBoard, if a project is set: pip install 'llava_jax[wandb]'. The name ""
    # is that of the workdir.
    config.wandb = Section()
    config.wandb.project = Option("", changeable=True)
    config.wandb.entity = Option("", changeable=True)
    config.wandb.name = Option("", changeable=True)
    return config


OPTIONS = {  # by dotted key, such as "data.json"
    key: value if isinstance(value, Option) else Option(value) for key, value in flatten(_declare())
}


def get_config() -> ConfigDict:
    """The defaults. It is locked: a recipe that sets an unknown option is an error."""
    config = ConfigDict()
    for key, option in OPTIONS.items():
        section, _, name = key.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[name] = option.default
    return config.lock()

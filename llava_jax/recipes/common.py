"""Every knob of a run, with what it means. Recipes start from here."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    # What is trained: "pretrain" (stage 1: the projector) or "finetune" (stage 2: projector and language model).
    config.stage = "pretrain"
    # The checkpoint to start from: the output of `convert import`, or the workdir of an earlier stage.
    config.init = ""
    # The preset whose shapes the checkpoint must have ("" takes any): see llava_jax/models/config.py.
    config.model = ""
    # The preset that preflight compiles where neither `model` nor `init` says which.
    config.default_model = ""
    # How conversations are written: see llava_jax/data/templates.py.
    config.template = "v1"
    # Where a picture stands in its turn: "first", "as_is" or "random" ([Xq, Xv] or [Xv, Xq], as in the paper).
    config.image_position = "first"
    # How pictures become squares: "square" (centre crop), "pad", "resize"; "" as in the checkpoint.
    config.image_aspect = ""
    # Orders the data and places random images.
    config.seed = 0

    config.data = ConfigDict()
    config.data.json = ""  # LLaVA JSON or JSONL
    config.data.images = ""  # the folder that its image names are relative to
    config.data.built = ""  # in place of both: a data set that `llava_jax.data.build` made
    # In place of all three: several sets, each with a weight, the times that an epoch goes through it (1 by default):
    # ({"json": "a.json", "images": "a"}, {"built": "b", "weight": 0.5}).
    config.data.mixture = ()
    # Whether images, those of `evaluate` included, may have absolute names: otherwise names stay below their folder.
    config.data.allow_absolute_images = False
    config.data.holdout = 0  # samples held out for the validation loss, chosen by the seed
    # A sample with a fault is an "error", or it is a "skip": it stays in its place, and nothing is learned from it.
    config.data.on_bad_sample = "error"
    config.data.max_bad_share = 0.01  # of the samples come to so far: with more the run stops
    config.data.workers = 0  # reading processes; 0 reads in threads of the training process

    # Positions of a sample, images included: longer ones are truncated (never through an image).
    config.max_length = 2048
    # Several samples a row, none of which sees another (docs/batches.md): a step is of more than batch_rows samples.
    config.pack = False
    # Positions of a packed row; 0 is max_length.
    config.row_length = 0
    # Steps whose samples all have images, or none, as the original's group_by_modality_length (docs/batches.md).
    config.group_by_modality = False
    # Rows of a step, over all devices. Unpacked, a row is a sample.
    config.batch_rows = 128
    # Rows that share image slots.
    config.rows_per_group = 1
    # Image slots of a group, and label slots (positions whose next token is learned); 0 plans the least that suffices
    # or, of image slots of packed rows, those with which least is left empty.
    # Data without pictures needs no image slots: -1 says so where there is no data to plan from, as in preflight.
    config.image_slots = 0
    config.label_slots = 0
    # At most so many rows on a device at once: more are accumulated. 0 sets no limit.
    config.max_rows_per_device = 0
    # Devices by axis; one may be -1: all that remain. Rows are split over data x fsdp, parameters over fsdp x tensor:
    # fsdp gathers a layer's parameters when it is computed, tensor splits the computation of each layer.
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})

    config.epochs = 1.0  # parts of one round up to whole steps
    config.steps = 0  # overrides epochs unless 0
    config.learning_rate = 2e-5
    config.projector_learning_rate = 0.0  # 0 means learning_rate
    config.warmup_ratio = 0.03  # of all steps, linear; then a cosine to 0
    config.weight_decay = 0.0  # of matrices; never of biases and norms
    config.beta1 = 0.9
    config.beta2 = 0.999
    config.epsilon = 1e-8
    config.clip_norm = 0.0  # of the gradient of what is trained; 0 is off

    # Types of computation and of frozen parameters: "float32", "bfloat16"; "" is bfloat16 on accelerators and, on
    # CPU, float32 and the type of the checkpoint. Trained parameters and Adam's moments are float32.
    config.compute_dtype = ""
    config.frozen_dtype = ""
    # Activations kept for the backward pass: "none" recomputes nothing, "full" every layer, "save_qkv" all but queries,
    # keys and values; "offload" is "full" with what it keeps in the memory of the host.
    config.remat = "full"
    # How attention is computed: "xla", "chunked", "splash" (TPU), "cudnn" (GPU); "" is the fastest that is right.
    config.attention = ""

    config.log_every = 1  # steps
    config.eval_every = 0  # steps between validation losses; 0 only at the end. Needs data.holdout.
    # A benchmark of `evaluate score` that is answered before the first step, every so many steps (0: not in between)
    # and after the last one: files of its questions and labels, the folder of its pictures, and on how many questions,
    # which the seed chooses (docs/evaluation.md). "" is none.
    config.evaluate = ConfigDict(
        {"benchmark": "", "questions": "", "labels": "", "images": "", "limit": 64, "every": 0}
    )
    config.save_every = 500  # steps
    config.keep = 2  # newest checkpoints

    # Where compiled programs are kept for the next start: a directory or gs://..., shared by runs; "" keeps none.
    config.compilation_cache = ""
    # A trace of so many steps from this one on, under profile/ in the workdir (tensorboard --logdir); 0 steps is off.
    config.profile = ConfigDict({"start": 10, "steps": 0})
    # Weights & Biases beside TensorBoard, off without a project: pip install 'llava_jax[wandb]'. A name of "" is the
    # workdir's.
    config.wandb = ConfigDict({"project": "", "entity": "", "name": ""})

    return config.lock()  # a recipe that sets a key which is not above is an error

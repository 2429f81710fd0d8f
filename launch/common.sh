# shellcheck shell=bash
# What the launch scripts share: one-line errors, dry runs, checks of arguments. Works in bash 3.2 (macOS) too.

DRY_RUN=false
TRAINING=() # what follows --: the flags of llava_jax.main

# Bad arguments are one line and exit status 2.
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The comment at the top of a script is its help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
}

# The arguments as one line that any shell reads back as the same arguments.
quote() {
  local word line="" apostrophe="'" escaped="'\\''"
  for word in "$@"; do
    case "$word" in
      '' | *[!a-zA-Z0-9_@%+=:,./-]*) line+=" '${word//$apostrophe/$escaped}'" ;;
      *) line+=" $word" ;;
    esac
  done
  printf '%s' "${line# }"
}

# Runs a command, or prints it in a dry run.
run() {
  if "$DRY_RUN"; then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

say() {
  if "$DRY_RUN"; then
    printf '# %s\n' "$*"
  else
    printf '%s\n' "$*" >&2
  fi
}

# need NAME VALUE: the option was given.
need() {
  [ -n "$2" ] || die "--$1 must be given; see --help"
}

# match NAME VALUE REGEX EXAMPLE: the option was given and looks right.
match() {
  need "$1" "$2"
  [[ $2 =~ ^($3)$ ]] || die "--$1 is $(quote "$2"), which is not like $4"
}

check_name() {
  match name "$1" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'my-run-1 (lower case, 40 characters at most)'
}

check_google_cloud() { # PROJECT ZONE
  match project "$1" '([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]' my-project-123
  match zone "$2" '[a-z]+-[a-z]+[0-9]+-[a-z]' us-central2-b
}

# Sizes that are offered: chips for v5e and v6e, TensorCores (two a chip) for v4 and v5p.
check_accelerator() {
  need accelerator "$1"
  local size="${1##*-}"
  [[ $size =~ ^[1-9][0-9]{0,4}$ ]] || size=0
  case "${1%-*}" in
    v5litepod | v6e)
      case "$size" in
        1 | 4 | 8 | 16 | 32 | 64 | 128 | 256) ;;
        *) die "--accelerator is $(quote "$1"): ${1%-*} has 1, 4, 8, 16, 32, 64, 128 or 256 chips" ;;
      esac
      ;;
    v4 | v5p)
      case "$size" in
        8 | 16 | 32 | 64) ;;
        *)
          [ "$size" -gt 0 ] && [ $((size % 128)) -eq 0 ] ||
            die "--accelerator is $(quote "$1"): ${1%-*} has 8, 16, 32, 64 or a multiple of 128 TensorCores"
          ;;
      esac
      ;;
    *) die "--accelerator is $(quote "$1"), which is not like v4-8, v5litepod-16, v5p-8 or v6e-8" ;;
  esac
}

# The name of an accelerator's flags in llava_jax/xla_flags.py.
flags_of() {
  case "${1%-*}" in
    v5litepod) echo v5e ;;
    *) echo "${1%-*}" ;;
  esac
}

# check_training REMOTE: what follows -- has a recipe that exists and a workdir, which with REMOTE=remote is in a bucket,
# since the hosts share no disk.
check_training() {
  local flag config="" workdir=""
  for flag in "${TRAINING[@]+"${TRAINING[@]}"}"; do
    case "$flag" in
      --config=*) config="${flag#--config=}" ;;
      --workdir=*) workdir="${flag#--workdir=}" ;;
      --config.?*=*) ;;
      --resume[-_]from=[0-9]* | --start_timeout=[0-9]*) ;;
      *) die "$(quote "$flag") after --: flags of training are --config=F, --workdir=D, --config.KEY=VALUE," \
        "--resume-from=STEP and --start_timeout=SECONDS" ;;
    esac
  done
  [ -n "$config" ] || die "--config=F must be given after --, as in: -- --config=configs/finetune.py --workdir=gs://..."
  local recipe="${config%%:*}"
  [ -f "$ROOT/$recipe" ] || [ -f "$ROOT/llava_jax/recipes/$recipe.py" ] ||
    [[ $1 != remote && $recipe = /* && -f $recipe ]] ||
    die "--config is $(quote "$config"): $ROOT has no file $recipe"
  [ -n "$workdir" ] || die "--workdir=D must be given after --"
  [ "$1" != remote ] || [[ $workdir =~ ^gs://[^/]+/.+ ]] ||
    die "--workdir is $(quote "$workdir"): the hosts share no disk, so it has to be like gs://bucket/run"
  [ "$PWD" = "$ROOT" ] || for flag in "${TRAINING[@]}"; do
    case "$flag" in
      --workdir=/* | --workdir=*://* | --config.*=/* | --config.*=*://*) ;;
      --workdir=?* | --config.init=?* | --config.data.json=?* | --config.data.images=?* | --config.data.built=?*)
        die "$(quote "$flag"): the training runs in $ROOT: give a path that begins with /, or start it from there"
        ;;
    esac
  done
}

#!/usr/bin/env bash
# Train a small code model on Python's own library, make it several times smaller in one run, and let it complete a line.
# `make quickstart` installs and calls this. Ctrl-C when you like: run again, it goes on where it was; `rm -r runs` starts anew.
set -euo pipefail
cd "$(dirname "$0")"

DENSE=runs/slm_5m SMALL=runs/slm_5m_compress
# bf16 is several times faster where the processor has it (AMX, AVX512-BF16), and several times slower where it has not.
PRECISION=$(python -c "from lightning_slm.nn.hardware import fast_dtype as f; print({2: 'bf16-mixed', 4: '32-true'}[f().itemsize])")

once() { # RUN_FOLDER COMMAND...: echo the command, and run it unless it has run to its end before
  local finished="$1.finished"
  shift
  printf '\n$ %s\n' "$*"
  if [ -e "$finished" ]; then
    echo "(done before)"
  else
    "$@" || { printf '\nStopped. The same command again, or make quickstart, goes on from there.\n'; exit 1; }
    touch "$finished"
  fi
}

echo "1. Train slm-5m on the standard library of this Python."
once $DENSE lightning-slm fit --config slm_5m --minutes 3 --trainer.precision "$PRECISION" --ckpt_path last

echo
echo "2. From its weights: 2:4 pruning, quantisation-aware training and distillation from it, in one run."
once $SMALL lightning-slm fit --config slm_5m_compress \
  --config prune_2_4 --config qat_int4 --config distill --config report \
  --minutes 2 --trainer.precision "$PRECISION" --ckpt_path last

echo
echo "3. What it cost, and what the small model makes of a line."
once $SMALL/exported lightning-slm export $SMALL $SMALL/exported
printf '\n$ cat %s\n' $SMALL/report/report.md
cat $SMALL/report/report.md
printf '\n$ lightning-slm generate %s %s\n' $SMALL/exported "'def read_csv(path):'"
lightning-slm generate $SMALL/exported 'def read_csv(path):'
printf '\nThe plot: %s/report/report.png\n' $SMALL

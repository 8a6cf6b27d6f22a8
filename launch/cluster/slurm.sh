#!/usr/bin/env bash
# Ray on all nodes of a Slurm allocation, and the whole pipeline on it. Submit from the repository, which all nodes must
# see, with the environment active:
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/cluster/slurm.sh configs/ml1m_official.yaml run.dir=/shared/runs/one
#
# Three minutes before the time limit, the run receives a stop request, saves a checkpoint, and the job is requeued.
# Without Slurm the script runs on this machine alone.
#SBATCH --job-name=collm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if (($# == 0)); then
  echo "usage: sbatch [options] launch/cluster/slurm.sh CONFIG [section.key=value ...]" >&2
  exit 2
fi
PREEMPTED=75 # the pipeline's exit code after a stop request
nodes=${SLURM_JOB_NUM_NODES:-1}
cpus=${SLURM_CPUS_PER_TASK:-$(nproc)}
# With several networks, HEAD_ADDRESS sets the address if the first one is wrong.
head=${HEAD_ADDRESS:-$(hostname -I | cut -d ' ' -f 1)}
head=${head:-127.0.0.1}
port=${RAY_PORT:-$((20000 + ${SLURM_JOB_ID:-$$} % 10000))}

# Without this token, anyone who reaches Ray's ports could run programs as you.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_ADDRESS="$head:$port" RAY_USAGE_STATS_ENABLED=0

# The head runs on this node, the first; srun starts Ray on the other nodes.
env -u RAY_ADDRESS ray start --head --node-ip-address="$head" --port="$port" --num-cpus="$cpus" \
  --include-dashboard=false --block &
if ((nodes > 1)); then
  srun --relative=1 --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --cpus-per-task="$cpus" \
    ray start --address="$RAY_ADDRESS" --num-cpus="$cpus" --block &
fi
ray_processes=$(jobs -p)
trap 'kill $ray_processes 2>/dev/null; wait' EXIT

python - "$nodes" <<'PYTHON'
import sys
import time

import ray

wanted, deadline = int(sys.argv[1]), time.monotonic() + 300
while True:
    try:
        ray.init(log_to_driver=False, ignore_reinit_error=True)
        alive = sum(node["Alive"] for node in ray.nodes())
    except (ConnectionError, RuntimeError, ray.exceptions.RayError):
        alive = 0
    if alive >= wanted:
        break
    if time.monotonic() > deadline:
        sys.exit(f"{alive} of {wanted} nodes have joined Ray within five minutes")
    time.sleep(1)
PYTHON

python launch/run_pipeline.py --config "$@" cluster.tuning=ray &
pipeline=$!
queue_again=no
trap 'queue_again=yes; kill -USR1 "$pipeline"' USR1
trap 'kill -TERM "$pipeline"' TERM
code=0
wait "$pipeline" || code=$?
while kill -0 "$pipeline" 2>/dev/null; do # a signal interrupts wait, not the pipeline
  code=0
  wait "$pipeline" || code=$?
done
if [[ $code == "$PREEMPTED" && $queue_again == yes && -n ${SLURM_JOB_ID:-} ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

#!/usr/bin/env bash
# The whole pipeline with tuning and evaluation on the hosts of a file, over ssh. From the repository, in the activated
# environment, both at the same paths on all hosts:
#
#   launch/cluster/run_on_hosts.sh hosts.txt configs/ml1m_official.yaml run.dir=/shared/runs/one
#
# Data and collaborative model are made here, or on the Ray cluster of cluster.ray_address.
set -euo pipefail

if (($# < 2)); then
  echo "usage: launch/cluster/run_on_hosts.sh HOSTFILE CONFIG [section.key=value ...]" >&2
  exit 2
fi
hostfile=$1
shift
exec python launch/run_pipeline.py --config "$@" "cluster.hostfile=$hostfile"

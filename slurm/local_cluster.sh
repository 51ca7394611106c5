#!/usr/bin/env bash
# A real Slurm with several emulated nodes on this one machine, to try `dualroute submit` and for the tests.
#
#   bash slurm/local_cluster.sh up     [--nodes N] [--dir DIR]   start; prints the line to paste into the shell
#   bash slurm/local_cluster.sh status [--dir DIR]               what runs (exit 3: nothing does)
#   bash slurm/local_cluster.sh down   [--dir DIR]               cancel every job, stop every daemon
#
#   --nodes N   nodes to emulate (default 2); each offers all CPUs of this machine
#   --dir DIR   configuration, logs, state, jobs.txt (default /tmp/dualroute-slurm); clusters in other folders
#               run beside each other
#
# It needs root, because slurmd starts jobs as the user who submitted them, but neither systemd nor cgroups.
# Nothing outside DIR is written: the munge key and socket are its own, an installed Slurm is not touched.
# Two partitions share the nodes: `main`, and `urgent`, whose jobs pre-empt those of `main` (these get their
# signal, then 30 seconds, then are requeued).
set -euo pipefail

fail() {
    echo "local_cluster.sh: $*" >&2
    exit 2
}

usage() { fail "usage: $0 up|down|status [--nodes N] [--dir DIR]"; }

command="${1:-}"
shift || true
nodes=2
dir=/tmp/dualroute-slurm
while [ $# -gt 0 ]; do
    case "$1" in
        --nodes) nodes="${2:-}"; shift 2 || usage ;;
        --dir) dir="${2:-}"; shift 2 || usage ;;
        *) usage ;;
    esac
done
[[ "$nodes" =~ ^[1-9][0-9]?$ ]] || fail "--nodes $nodes: give a number from 1 to 99"
[ -n "$dir" ] || usage
dir="$(realpath -m "$dir")"
conf="$dir/slurm.conf"
export SLURM_CONF="$conf"
PATH="$PATH:/usr/sbin:/sbin"

require_slurm() {
    local missing=()
    for program in munged slurmctld slurmd sbatch scontrol; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [ ${#missing[@]} -eq 0 ] || fail "Slurm is not installed (no ${missing[*]}); on Debian or Ubuntu:
    apt-get install -y --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge"
    [ "$(id -u)" = 0 ] || fail "root is needed to start slurmd: run it with sudo"
}

# pids of the daemons that were started from this folder and still live, one "name pid" a line
daemons() {
    local file pid name
    for file in "$dir"/*.pid; do
        [ -s "$file" ] || continue
        pid="$(cat "$file")" name="$(basename "$file" .pid)"
        # a pid may have been given to another process since
        if tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$dir"; then
            echo "$name $pid"
        fi
    done
}

free_ports() { # N ports that nobody listens on
    local port=17000 found=0
    while [ "$found" -lt "$1" ]; do
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            found=$((found + 1))
        fi
        port=$((port + 1))
    done
}

write_configuration() {
    local ports host cpus memory
    mapfile -t ports < <(free_ports $((nodes + 1)))
    host="$(hostname -s)" cpus="$(nproc)"
    memory="$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)"
    cat >"$conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=${ports[0]}
AuthType=auth/munge
# a requeued job starts again as soon as its old credential has expired; Slurm's default is two minutes
AuthInfo=socket=$dir/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmdTimeout=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
CONF
    for index in $(seq "$nodes"); do
        echo "NodeName=emu$index NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$index]}" \
            "CPUs=$cpus RealMemory=$memory State=UNKNOWN" >>"$conf"
    done
    {
        echo "PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=30"
        echo "PartitionName=urgent Nodes=ALL State=UP PriorityTier=10"
    } >>"$conf"
}

start_munge() {
    dd if=/dev/urandom of="$dir/munge.key" bs=128 count=1 status=none
    mkdir -p "$dir/munge"
    chown munge "$dir/munge" "$dir/munge.key"
    chmod 600 "$dir/munge.key"
    # munged writes its socket, lock and pid as its own user
    chmod 755 "$dir" "$dir/munge"
    ln -sfn munge/socket "$dir/munge.socket"
    setpriv --reuid munge --regid munge --clear-groups munged --key-file="$dir/munge.key" \
        --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" \
        --seed-file="$dir/munge/seed" || fail "munged did not start: see $dir/munge/log"
    ln -sfn munge/pid "$dir/munged.pid"
}

wait_for_nodes() {
    local idle=0
    for _ in $(seq 150); do
        idle="$(sinfo --noheader --partition=main --states=idle --format=%D 2>/dev/null || true)"
        [ "${idle// /}" = "$nodes" ] && return
        sleep 0.2
    done
    sinfo >&2 || true
    tail -n 5 "$dir"/slurm*.log >&2
    fail "the nodes did not come up within 30 seconds; logs lie in $dir"
}

up() {
    require_slurm
    [ -z "$(daemons)" ] || fail "a cluster runs in $dir already: use it (export SLURM_CONF=$conf) or take it down"
    # only what `up` made itself may be removed
    if [ -e "$dir" ] && [ ! -e "$dir/.local_cluster" ] && [ -n "$(ls -A "$dir")" ]; then
        fail "$dir holds other files: choose an empty folder with --dir"
    fi
    rm -rf "$dir"
    mkdir -p "$dir/state"
    touch "$dir/.local_cluster"
    trap 'down >/dev/null 2>&1' ERR EXIT # half a cluster helps nobody
    write_configuration
    start_munge
    slurmctld -f "$conf" || fail "slurmctld did not start: see $dir/slurmctld.log"
    for index in $(seq "$nodes"); do
        mkdir -p "$dir/spool-emu$index"
        slurmd -f "$conf" -N "emu$index" || fail "slurmd of emu$index did not start: see $dir/slurmd-emu$index.log"
    done
    wait_for_nodes
    trap - ERR EXIT
    echo "# Slurm with $nodes node(s) runs; logs and finished jobs (jobs.txt) lie in $dir"
    echo "export SLURM_CONF=$conf"
}

down() {
    local name pid
    if [ -z "$(daemons)" ]; then
        echo "no cluster runs in $dir"
        return
    fi
    [ "$(id -u)" = 0 ] || fail "root is needed to stop the daemons: run it with sudo"
    cancel_jobs
    while read -r name pid; do stop "$pid" "$name"; done < <(daemons | grep '^slurmd-')
    while read -r name pid; do stop "$pid" "$name"; done < <(daemons | grep -v '^slurmd-')
    echo "stopped the cluster in $dir"
}

cancel_jobs() {
    local left
    command -v scancel >/dev/null || return 0
    mapfile -t left < <(timeout 10 squeue --noheader --format=%A 2>/dev/null || true)
    [ ${#left[@]} -gt 0 ] || return 0
    timeout 10 scancel "${left[@]}" 2>/dev/null || true
    timeout 10 scancel --full --signal=KILL "${left[@]}" 2>/dev/null || true
    for _ in $(seq 100); do
        [ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ] || return 0
        sleep 0.2
    done
    echo "some jobs did not end: $(squeue --noheader --format=%A | tr '\n' ' ')" >&2
}

stop() { # PID NAME: ask, wait 10 seconds, insist
    kill "$1" 2>/dev/null || return 0
    for _ in $(seq 100); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
    echo "$2 did not stop by itself and was killed" >&2
    kill -9 "$1" 2>/dev/null || true
}

status() {
    if [ -z "$(daemons)" ]; then
        echo "no cluster runs in $dir"
        exit 3
    fi
    daemons
    echo "export SLURM_CONF=$conf"
    sinfo
    squeue
}

case "$command" in
    up) up ;;
    down) down ;;
    status) status ;;
    *) usage ;;
esac

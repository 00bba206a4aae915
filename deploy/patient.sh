#!/bin/bash
# Runs a command of the pipeline, again after a pause while it says that the same command finishes the work later
# (exit code 75: MLflow does not answer, or another process works on the run). In place, because a job that fails
# makes Kubernetes start a whole new cluster. What is still unfinished after the last time is no failure either: the
# last line says so, and the next call, tomorrow's or by hand, goes on with it.
#   patient.sh COMMAND [ARGUMENT ...]
pause=${PATIENT_PAUSE:-300} # seconds
times=${PATIENT_TIMES:-7}
stopped=
child=
trap 'stopped=1; [ -n "$child" ] && kill -TERM "$child"' TERM INT

# Runs a command to its end; a signal goes to it, which may need a while for its checkpoint. Returns its exit code.
run() {
    "$@" &
    child=$!
    [ -n "$stopped" ] && kill -TERM "$child" # it came before the process had a name
    wait "$child"
    local code=$?
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        code=$?
    done
    child=
    return "$code"
}

for ((number = 1; number <= times; number++)); do
    run "$@"
    code=$?
    [ "$code" -eq 75 ] || exit "$code"
    [ "$number" -eq "$times" ] && break
    echo "exit code 75: once more in $pause s ($number of $times)"
    run sleep "$pause" || exit 143
done
echo "NOT FINISHED: exit code 75 for $times times; nothing is lost, the next call of the same command goes on"

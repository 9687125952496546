#!/bin/sh
# shellcheck disable=SC1091,SC2034 # files of the image; variables are for them
# Runs the steps of one phase, each in a shell of its own: `run identity` or `run settle`. What was done is not done again
# for this image; what failed is tried at each start from it, and so is what `settle` had to leave.
#
# A step ends with 0 (done), 3 (nothing to do), 4 (left as it was, with the reason) or anything else (failed, and what it
# had changed is as before). What it says goes to the console, to the journal and to the report.
set -u
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
phase=$1
here=/run/rewind/settle
. "$here/settings"
RW_HERE=$here RW_STATE=/var/lib/rewind RW_REPORT=$here/report RW_STEP=$phase
. "$here/lib"
done_mark=$RW_STATE/$phase-$RW_IMAGE

if [ -e "$done_mark" ]; then
    say "done before, for this image"
    # The report of the other phase tells of this one, too.
    [ "$phase" = settle ] || sed "/^$phase: /d" "$done_mark" >>"$RW_REPORT"
    exit 0
fi
if ! mkdir -p "$RW_STATE" || ! : >"$RW_STATE/.writable"; then
    say "failed: $RW_STATE cannot be written"
    exit 1
fi
rm -f "$RW_STATE/.writable"
failed=0 ran=0 unmoved=0 unkept=''
# A shutdown waits for the step that runs (`TimeoutStopSec`): a shell looks at a signal when its program has ended.
stopped=
trap 'stopped=1' TERM

# The step's lines of the report, whole or not at all.
keep() {
    { [ ! -e "$done_mark.steps" ] || cat "$done_mark.steps"; } >"$done_mark.steps.new" &&
        grep "^$RW_STEP: " "$RW_REPORT" >>"$done_mark.steps.new" &&
        sync "$done_mark.steps.new" && mv "$done_mark.steps.new" "$done_mark.steps" && sync "$done_mark.steps"
}

report_as() { cp "$RW_REPORT" "$done_mark.new" && sync "$done_mark.new" && mv "$done_mark.new" "$1" && sync; }

for script in "$here/steps/$phase"/*; do
    if [ -n "$stopped" ]; then
        RW_STEP=$phase
        say "the system goes down; the next start from this boot volume goes on"
        exit 1
    fi
    RW_STEP=${script##*/[0-9][0-9]-} ran=$((ran + 1))
    # A start that was cut off has done some of them: keys, for one, do not change a second time. What they came to is
    # told again, since the report of that start is gone.
    if grep -Eqsx "$RW_STEP: (done|nothing to do)" "$done_mark.steps"; then
        say "done before, for this image"
        grep "^$RW_STEP: " "$done_mark.steps" >>"$RW_REPORT"
        continue
    fi
    code=0
    # shellcheck disable=SC1090 # a step
    (. "$script") || code=$?
    case $code in
        0) say "done" ;;
        3) say "nothing to do" ;;
        4) say "left as it was" && unmoved=$((unmoved + 1)) ;;
        *) say "failed ($code)" && failed=1 ;;
    esac
    case $code in 0 | 3) ;; *) echo "$RW_STEP" >>"$here/undone" ;; esac
    sync
    case $code in 0 | 3) keep || unkept="$unkept $RW_STEP" ;; esac
done
sync
RW_STEP=$phase
if [ -n "$unkept" ]; then
    say "$RW_STATE cannot be written, so these begin anew at the next start:$unkept"
    failed=1
fi
# The report of this phase tells of the other one, too: as long as something of that has failed it is not the last one.
if [ "$phase" = settle ] && [ -d "$here/steps/identity" ] && [ ! -e "$RW_STATE/identity-$RW_IMAGE" ]; then failed=1; fi
# What was left for want of a package is done once somebody has installed it. Not so who the machine is: addresses that
# were left are for somebody to change, and nobody takes them away again.
again=0
[ "$phase" != settle ] || again=$unmoved
if [ "$failed" != 0 ] || [ "$again" != 0 ]; then
    say "not all could be done; it is tried again at the next start from this boot volume"
    report_as "$done_mark.failed"
    exit "$failed"
fi
if ! report_as "$done_mark"; then
    say "not all could be done: $done_mark cannot be written; it is tried again at the next start from this boot volume"
    exit 1
fi
rm -f "$done_mark.steps" "$done_mark.failed"
sync
rest='; the others left things as they were'
[ "$unmoved" != 0 ] || rest=
say "$((ran - unmoved)) of $ran steps are done$rest"
say "done"

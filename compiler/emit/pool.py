"""The process-wide thread pool, as LLVM IR.

    void gf_parallel(void (*task)(void *args, int64_t begin, int64_t end, int64_t worker),
                     void *args, int64_t tasks, int64_t threads);
    void gf_pool_reset(void);

`gf_parallel` splits [0, tasks) into one contiguous share for each thread of the team, which is min(threads,
tasks, MAX_THREADS) of them, fewer only where the system refuses a thread; the caller is worker 0. A worker
takes half of what is left of its own share, from the front, until nothing is, and then helps the others:
half of what is left of theirs, from the back. So a worker that the system keeps from running holds up nobody
for more than the piece that it has begun, and caches still see the same worker at the same place of one call
after another. `worker` says who runs a piece; which pieces there are is not the same every time. It returns
when all tasks are done. A call made while another one runs, from within a task or from another thread, does
its whole range on the calling thread as worker 0.

Workers are created when first needed and wait for the next call: spinning for SPIN_NS, giving way to other
threads for most of that, then parked on a condition variable. `gf_pool_reset` makes the pool forget its
threads; a child process calls it after a fork, which copies the memory but not the threads.
"""

from __future__ import annotations

from graphflow.compiler.emit.object import compile_object
from graphflow.compiler.target import Target

MAX_THREADS = 256
#: How long an idle worker spins before it parks, and how much of that without giving way, in nanoseconds.
SPIN_NS, EAGER_NS = 300_000, 20_000


def pool_ir(target: Target) -> str:
    """The pool's module as IR text."""
    text = _POOL
    values = {
        "MAX_THREADS": MAX_THREADS, "SPIN_NS": SPIN_NS, "EAGER_NS": EAGER_NS,
        "CLOCK_MONOTONIC": 6 if target.is_macos else 1,
        "SIG_SETMASK": 3 if target.is_macos else 2,
        "SIGBUS": 10 if target.is_macos else 7,
        "PAUSE": "@llvm.aarch64.hint(i32 1)" if target.is_arm else "@llvm.x86.sse2.pause()",
        "PAUSE_PARAMS": "@llvm.aarch64.hint(i32)" if target.is_arm else "@llvm.x86.sse2.pause()",
    }
    for name, value in values.items():
        text = text.replace(f"${name}$", str(value))
    return text


def pool_object(target: Target) -> bytes:
    """The pool's object code, to hand to the runtime's `install_pool`."""
    return compile_object(pool_ir(target), target)


_POOL = """
; What a worker owns: its share, whether it is parked, a mutex and a condition variable (64 bytes hold either
; on every supported system). A share is the number of the call in the upper 32 bits, then the first and the
; end of the units that nobody has taken, 16 bits each; a unit is so many tasks that these suffice. Who takes
; some of it exchanges the whole word, which fails if anything changed since it was read: so the fields
; read in between are those of this call, as they change only while all shares are empty.
%Worker = type { i64, i32, [52 x i8], [64 x i8], [64 x i8], [64 x i8] }
@workers = internal global [$MAX_THREADS$ x %Worker] zeroinitializer, align 64
@started = internal global i64 1, align 64

@busy = internal global { i32, [60 x i8] } zeroinitializer, align 64
@pending = internal global { i64, [56 x i8] } zeroinitializer, align 64
@call_task = internal global ptr null, align 64
@call_args = internal global ptr null
@call_tasks = internal global i64 0
@call_unit = internal global i64 0
@call_team = internal global i64 0
@call_number = internal global i64 0

declare i32 @pthread_create(ptr, ptr, ptr, ptr) nounwind
declare i32 @pthread_detach(ptr) nounwind
declare i32 @pthread_sigmask(i32, ptr, ptr) nounwind
declare i32 @sigfillset(ptr) nounwind
declare i32 @sigdelset(ptr, i32) nounwind
declare i32 @pthread_mutex_init(ptr, ptr) nounwind
declare i32 @pthread_mutex_lock(ptr) nounwind
declare i32 @pthread_mutex_unlock(ptr) nounwind
declare i32 @pthread_cond_init(ptr, ptr) nounwind
declare i32 @pthread_cond_wait(ptr, ptr) nounwind
declare i32 @pthread_cond_signal(ptr) nounwind
declare i32 @sched_yield() nounwind
declare i32 @clock_gettime(i32, ptr) nounwind
declare i64 @llvm.smin.i64(i64, i64)
declare void $PAUSE_PARAMS$

define internal i64 @now() nounwind {
  %time = alloca { i64, i64 }
  call i32 @clock_gettime(i32 $CLOCK_MONOTONIC$, ptr %time)
  %seconds = load i64, ptr %time
  %rest_at = getelementptr { i64, i64 }, ptr %time, i64 0, i32 1
  %rest = load i64, ptr %rest_at
  %scaled = mul i64 %seconds, 1000000000
  %total = add i64 %scaled, %rest
  ret i64 %total
}

; Run pieces of the worker's own share, then of those of the others, until there are none.
define internal void @work(i64 %id) nounwind {
entry:
  br label %scan
scan:
  %nth = phi i64 [ 0, %entry ], [ %further, %empty ]
  %size = load atomic i64, ptr @call_team monotonic, align 8
  %outside = icmp uge i64 %id, %size
  %all = icmp uge i64 %nth, %size
  %over = or i1 %outside, %all
  br i1 %over, label %end, label %choose
choose:
  %sum = add i64 %id, %nth
  %wrapped = sub i64 %sum, %size
  %past = icmp uge i64 %sum, %size
  %victim = select i1 %past, i64 %wrapped, i64 %sum
  %share = getelementptr [$MAX_THREADS$ x %Worker], ptr @workers, i64 0, i64 %victim
  %own = icmp eq i64 %nth, 0
  br label %look
look:
  %word = load atomic i64, ptr %share acquire, align 8
  %shifted = lshr i64 %word, 16
  %first = and i64 %shifted, 65535
  %last = and i64 %word, 65535
  %some = icmp ult i64 %first, %last
  br i1 %some, label %take, label %empty
empty:
  %further = add i64 %nth, 1
  br label %scan
take:
  %task = load atomic ptr, ptr @call_task monotonic, align 8
  %args = load atomic ptr, ptr @call_args monotonic, align 8
  %tasks = load atomic i64, ptr @call_tasks monotonic, align 8
  %unit = load atomic i64, ptr @call_unit monotonic, align 8
  %team = load atomic i64, ptr @call_team monotonic, align 8
  %member = icmp ult i64 %id, %team
  br i1 %member, label %exchange, label %end
exchange:
  %rest = sub i64 %last, %first
  %rounded = add i64 %rest, 1
  %half = lshr i64 %rounded, 1
  %front = shl i64 %half, 16
  %without_front = add i64 %word, %front
  %without_back = sub i64 %word, %half
  %left = select i1 %own, i64 %without_front, i64 %without_back
  %back = sub i64 %last, %half
  %from = select i1 %own, i64 %first, i64 %back
  %pair = cmpxchg ptr %share, i64 %word, i64 %left acq_rel acquire
  %mine = extractvalue { i64, i1 } %pair, 1
  br i1 %mine, label %run, label %look
run:
  %to = add i64 %from, %half
  %begin = mul i64 %from, %unit
  %whole = mul i64 %to, %unit
  %stop = call i64 @llvm.smin.i64(i64 %whole, i64 %tasks)
  call void %task(ptr %args, i64 %begin, i64 %stop, i64 %id)
  atomicrmw sub ptr @pending, i64 %half release
  br label %look
end:
  ret void
}

; Whether there is something left of a share.
define internal i1 @waits(ptr %share) nounwind {
  %word = load atomic i64, ptr %share seq_cst, align 8
  %shifted = lshr i64 %word, 16
  %first = and i64 %shifted, 65535
  %last = and i64 %word, 65535
  %some = icmp ult i64 %first, %last
  ret i1 %some
}

define internal ptr @worker_main(ptr %argument) nounwind {
entry:
  %id = ptrtoint ptr %argument to i64
  %me = getelementptr [$MAX_THREADS$ x %Worker], ptr @workers, i64 0, i64 %id
  %parked = getelementptr %Worker, ptr %me, i64 0, i32 1
  %mutex = getelementptr %Worker, ptr %me, i64 0, i32 3
  %condition = getelementptr %Worker, ptr %me, i64 0, i32 4
  br label %idle
idle:
  %since = call i64 @now()
  br label %spin
spin:
  %spins = phi i64 [ 0, %idle ], [ %more, %pause ], [ 0, %yield ], [ 0, %rest ]
  %called = call i1 @waits(ptr %me)
  br i1 %called, label %work, label %pause
pause:
  call void $PAUSE$
  %more = add i64 %spins, 1
  %ask = icmp ugt i64 %spins, 32
  br i1 %ask, label %rest, label %spin
rest:
  %time = call i64 @now()
  %waited = sub i64 %time, %since
  %eager = icmp ult i64 %waited, $EAGER_NS$
  br i1 %eager, label %spin, label %patience
patience:
  %late = icmp ugt i64 %waited, $SPIN_NS$
  br i1 %late, label %park, label %yield
yield:
  call i32 @sched_yield()
  br label %spin
park:
  call i32 @pthread_mutex_lock(ptr %mutex)
  store atomic i32 1, ptr %parked seq_cst, align 4
  br label %check
check:
  %wanted = call i1 @waits(ptr %me)
  br i1 %wanted, label %unpark, label %wait
wait:
  call i32 @pthread_cond_wait(ptr %condition, ptr %mutex)
  br label %check
unpark:
  store atomic i32 0, ptr %parked seq_cst, align 4
  call i32 @pthread_mutex_unlock(ptr %mutex)
  br label %work
work:
  call void @work(i64 %id)
  br label %idle
}

; Create workers until there are `wanted`, the caller among them; returns how many can work, at most `wanted`.
; Workers block signals: they belong to the threads of the program. Faults stay theirs.
define internal i64 @grow(i64 %wanted) nounwind {
entry:
  %thread = alloca i64
  %all = alloca [128 x i8], align 16
  %kept = alloca [128 x i8], align 16
  %have = load i64, ptr @started
  %enough = icmp uge i64 %have, %wanted
  br i1 %enough, label %done, label %begin
begin:
  call i32 @sigfillset(ptr %all)
  call i32 @sigdelset(ptr %all, i32 4)
  call i32 @sigdelset(ptr %all, i32 $SIGBUS$)
  call i32 @sigdelset(ptr %all, i32 8)
  call i32 @sigdelset(ptr %all, i32 11)
  call i32 @pthread_sigmask(i32 $SIG_SETMASK$, ptr %all, ptr %kept)
  br label %create
create:
  %id = phi i64 [ %have, %begin ], [ %next, %created ]
  %worker = getelementptr [$MAX_THREADS$ x %Worker], ptr @workers, i64 0, i64 %id
  %parked = getelementptr %Worker, ptr %worker, i64 0, i32 1
  %mutex = getelementptr %Worker, ptr %worker, i64 0, i32 3
  %condition = getelementptr %Worker, ptr %worker, i64 0, i32 4
  store i64 0, ptr %worker
  store i32 0, ptr %parked
  call i32 @pthread_mutex_init(ptr %mutex, ptr null)
  call i32 @pthread_cond_init(ptr %condition, ptr null)
  %argument = inttoptr i64 %id to ptr
  %failed = call i32 @pthread_create(ptr %thread, ptr null, ptr @worker_main, ptr %argument)
  %ok = icmp eq i32 %failed, 0
  br i1 %ok, label %created, label %finish
created:
  %handle = load ptr, ptr %thread
  call i32 @pthread_detach(ptr %handle)
  %next = add i64 %id, 1
  %again = icmp ult i64 %next, %wanted
  br i1 %again, label %create, label %finish
finish:
  %number = phi i64 [ %id, %create ], [ %next, %created ]
  store i64 %number, ptr @started
  call i32 @pthread_sigmask(i32 $SIG_SETMASK$, ptr %kept, ptr null)
  br label %done
done:
  %count = load i64, ptr @started
  %team = call i64 @llvm.smin.i64(i64 %count, i64 %wanted)
  ret i64 %team
}

define void @gf_parallel(ptr %task, ptr %args, i64 %tasks, i64 %threads) nounwind {
entry:
  %limit = call i64 @llvm.smin.i64(i64 %threads, i64 $MAX_THREADS$)
  %wanted = call i64 @llvm.smin.i64(i64 %limit, i64 %tasks)
  %single = icmp slt i64 %wanted, 2
  br i1 %single, label %alone, label %acquire
acquire:
  %pair = cmpxchg ptr @busy, i32 0, i32 1 acquire monotonic
  %mine = extractvalue { i32, i1 } %pair, 1
  br i1 %mine, label %publish, label %alone
alone:
  %some = icmp sgt i64 %tasks, 0
  br i1 %some, label %inline, label %end
inline:
  call void %task(ptr %args, i64 0, i64 %tasks, i64 0)
  br label %end
publish:
  %team = call i64 @grow(i64 %wanted)
  %more_tasks = add i64 %tasks, 65534
  %unit = udiv i64 %more_tasks, 65535
  %up = add i64 %unit, -1
  %padded = add i64 %tasks, %up
  %units = udiv i64 %padded, %unit
  store atomic ptr %task, ptr @call_task monotonic, align 8
  store atomic ptr %args, ptr @call_args monotonic, align 8
  store atomic i64 %tasks, ptr @call_tasks monotonic, align 8
  store atomic i64 %unit, ptr @call_unit monotonic, align 8
  store atomic i64 %team, ptr @call_team monotonic, align 8
  store atomic i64 %units, ptr @pending monotonic, align 8
  %old = load i64, ptr @call_number
  %number = add i64 %old, 1
  store i64 %number, ptr @call_number
  %upper = shl i64 %number, 32
  br label %hand_out
hand_out:
  %member = phi i64 [ 0, %publish ], [ %following, %hand_out ]
  %following = add i64 %member, 1
  %low = mul i64 %member, %units
  %high = mul i64 %following, %units
  %first = udiv i64 %low, %team
  %last = udiv i64 %high, %team
  %first_bits = shl i64 %first, 16
  %range = or i64 %first_bits, %last
  %share = or i64 %upper, %range
  %share_at = getelementptr [$MAX_THREADS$ x %Worker], ptr @workers, i64 0, i64 %member
  store atomic i64 %share, ptr %share_at release, align 8
  %others = icmp ult i64 %following, %team
  br i1 %others, label %hand_out, label %handed_out
handed_out:
  fence seq_cst
  br label %wake
wake:
  %id = phi i64 [ 1, %handed_out ], [ %next, %woken ]
  %more = icmp ult i64 %id, %team
  br i1 %more, label %look, label %own
look:
  %worker = getelementptr [$MAX_THREADS$ x %Worker], ptr @workers, i64 0, i64 %id
  %parked_at = getelementptr %Worker, ptr %worker, i64 0, i32 1
  %parked = load atomic i32, ptr %parked_at seq_cst, align 4
  %asleep = icmp ne i32 %parked, 0
  br i1 %asleep, label %signal, label %woken
signal:
  %mutex = getelementptr %Worker, ptr %worker, i64 0, i32 3
  %condition = getelementptr %Worker, ptr %worker, i64 0, i32 4
  call i32 @pthread_mutex_lock(ptr %mutex)
  call i32 @pthread_cond_signal(ptr %condition)
  call i32 @pthread_mutex_unlock(ptr %mutex)
  br label %woken
woken:
  %next = add i64 %id, 1
  br label %wake
own:
  call void @work(i64 0)
  br label %join
join:
  %spins = phi i64 [ 0, %own ], [ %spun, %pause ], [ %spun, %yield ]
  %left = load atomic i64, ptr @pending acquire, align 8
  %finished = icmp eq i64 %left, 0
  br i1 %finished, label %release, label %pause
pause:
  call void $PAUSE$
  %spun = add i64 %spins, 1
  %long = icmp ugt i64 %spins, 2048
  %phase = and i64 %spins, 63
  %due = icmp eq i64 %phase, 0
  %give = and i1 %long, %due
  br i1 %give, label %yield, label %join
yield:
  call i32 @sched_yield()
  br label %join
release:
  store atomic i32 0, ptr @busy release, align 4
  br label %end
end:
  ret void
}

define void @gf_pool_reset() nounwind {
entry:
  store i64 1, ptr @started
  store i64 0, ptr @pending
  br label %forget
forget:
  %id = phi i64 [ 0, %entry ], [ %next, %forget ]
  %share = getelementptr [$MAX_THREADS$ x %Worker], ptr @workers, i64 0, i64 %id
  store i64 0, ptr %share
  %next = add i64 %id, 1
  %more = icmp ult i64 %next, $MAX_THREADS$
  br i1 %more, label %forget, label %done
done:
  store atomic i32 0, ptr @busy release, align 4
  ret void
}
"""

"""The process-wide thread pool, as LLVM IR.

    void gf_parallel(void (*task)(void *args, int64_t begin, int64_t end, int64_t worker),
                     void *args, int64_t tasks, int64_t threads);
    void gf_pool_reset(void);

`gf_parallel` splits [0, tasks) into contiguous shares, share w being [w·tasks/team, (w+1)·tasks/team), and
runs each on its own thread; the caller is worker 0. The team is min(threads, tasks, MAX_THREADS), fewer only
where the system refuses a thread. It returns when all shares are done. A call made while another one runs,
from within a task or from another thread, does its whole range on the calling thread as worker 0.

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
; What a worker owns: the last word it has seen when it starts, whether it is parked, a mutex and a condition
; variable (64 bytes hold either on every supported system).
%Worker = type { i64, i32, [52 x i8], [64 x i8], [64 x i8], [64 x i8] }
@workers = internal global [$MAX_THREADS$ x %Worker] zeroinitializer, align 64
@started = internal global i64 1, align 64

; The word that announces a call: its number in the upper 48 bits, the size of its team in the lower 16.
; Both are read at once, so a worker outside the team never looks at the call's fields, which may change.
@word = internal global { i64, [56 x i8] } zeroinitializer, align 64
@pending = internal global { i64, [56 x i8] } zeroinitializer, align 64
@busy = internal global { i32, [60 x i8] } zeroinitializer, align 64
@call_task = internal global ptr null, align 64
@call_args = internal global ptr null
@call_tasks = internal global i64 0

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

define internal void @run_share(i64 %worker, i64 %team) nounwind {
  %task = load ptr, ptr @call_task
  %args = load ptr, ptr @call_args
  %tasks = load i64, ptr @call_tasks
  %next = add i64 %worker, 1
  %low = mul i64 %worker, %tasks
  %high = mul i64 %next, %tasks
  %begin = udiv i64 %low, %team
  %end = udiv i64 %high, %team
  call void %task(ptr %args, i64 %begin, i64 %end, i64 %worker)
  ret void
}

define internal ptr @worker_main(ptr %argument) nounwind {
entry:
  %id = ptrtoint ptr %argument to i64
  %me = getelementptr [$MAX_THREADS$ x %Worker], ptr @workers, i64 0, i64 %id
  %parked = getelementptr %Worker, ptr %me, i64 0, i32 1
  %mutex = getelementptr %Worker, ptr %me, i64 0, i32 3
  %condition = getelementptr %Worker, ptr %me, i64 0, i32 4
  %first = load i64, ptr %me
  br label %idle
idle:
  %before = phi i64 [ %first, %entry ], [ %new, %work ]
  %since = call i64 @now()
  br label %spin
spin:
  %seen = phi i64 [ %before, %idle ], [ %seen, %pause ], [ %seen, %yield ], [ %seen, %rest ], [ %word, %else ]
  %spins = phi i64 [ 0, %idle ], [ %more, %pause ], [ 0, %yield ], [ 0, %rest ], [ %spins, %else ]
  %word = load atomic i64, ptr @word acquire, align 8
  %same = icmp eq i64 %word, %seen
  br i1 %same, label %pause, label %else
else:
  %team = and i64 %word, 65535
  %member = icmp ult i64 %id, %team
  br i1 %member, label %work, label %spin
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
  %now_word = load atomic i64, ptr @word seq_cst, align 8
  %changed = icmp ne i64 %now_word, %seen
  %now_team = and i64 %now_word, 65535
  %now_member = icmp ult i64 %id, %now_team
  %wanted = and i1 %changed, %now_member
  br i1 %wanted, label %unpark, label %wait
wait:
  call i32 @pthread_cond_wait(ptr %condition, ptr %mutex)
  br label %check
unpark:
  store atomic i32 0, ptr %parked seq_cst, align 4
  call i32 @pthread_mutex_unlock(ptr %mutex)
  br label %work
work:
  %new = phi i64 [ %word, %else ], [ %now_word, %unpark ]
  %new_team = and i64 %new, 65535
  call void @run_share(i64 %id, i64 %new_team)
  atomicrmw sub ptr @pending, i64 1 release
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
  %word = load i64, ptr @word
  store i64 %word, ptr %worker
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
  store ptr %task, ptr @call_task
  store ptr %args, ptr @call_args
  store i64 %tasks, ptr @call_tasks
  %others = sub i64 %team, 1
  store atomic i64 %others, ptr @pending monotonic, align 8
  %old = load atomic i64, ptr @word monotonic, align 8
  %number = and i64 %old, -65536
  %advanced = add i64 %number, 65536
  %announced = or i64 %advanced, %team
  store atomic i64 %announced, ptr @word seq_cst, align 8
  br label %wake
wake:
  %id = phi i64 [ 1, %publish ], [ %next, %woken ]
  %more = icmp ult i64 %id, %team
  br i1 %more, label %look, label %share
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
share:
  call void @run_share(i64 0, i64 %team)
  br label %join
join:
  %spins = phi i64 [ 0, %share ], [ %spun, %pause ], [ %spun, %yield ]
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
  store i64 1, ptr @started
  store i64 0, ptr @pending
  store atomic i32 0, ptr @busy release, align 4
  ret void
}
"""

"""Executes, in numpy, the PTX that Mosaic GPU makes of Pallas kernels for Hopper.

Pallas' own simulator executes what a kernel says, and knows no registers, no swizzles and no
fences; ptxas knows whether a program is one. Between the two lies what Mosaic GPU makes of the
kernel, which is executed here: each warpgroup in lockstep, in an order that a seed shuffles, with
copies that happen as late as they may, the newest first, at once, or at any time. Times are none of
its business. All of our kernels for Hopper are executed: `tests/kernels_pallas/test_executed_*`.

`launch.executed` runs a kernel on arrays: it compiles (`launch`), reads what the host would pass
(`host`), parses (`ptx`), and runs blocks of threads one after the other (`machine`) on memories
(`memory`) that warpgroups (`warpgroup`, `instructions`, `arithmetic`, `matrix`) share (`block`).

What is wrong is a finding, and a test asserts that there are none: a deadlock, an address that is
none, what nobody has written, a fence or a wait that is missing, and accesses to shared memory that
nothing orders (`order`). `tests/kernels_pallas/test_executor.py` spoils a kernel in each of these
ways. Lanes of a warpgroup do not race here, nor do blocks of threads.

Sections are those of the PTX ISA, 9.0: https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

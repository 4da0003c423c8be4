"""tile: decides how each loop of a kernel runs. LoopKernel -> LoopKernel, ContractionKernel -> ContractionKernel.

What it hands to the emitters (and what `lower` hands to it differs only in that no loop is marked "lanes", loops are not
collapsed and `Contraction.tile` is empty):

- Loops of kind "grid" are outermost and perfectly nested; iterations are independent. They may be none.
- At most one loop of kind "lanes" lies on any path. It is vectorised: its iterations are independent. It may be
    * the innermost loop, below grid loops (elementwise) - where there are no grid loops at all, or too few, the
      emitter also cuts the lanes loop into chunks, by a rule of shapes only, so that tasks = grid x chunks;
    * above serial loops and Lets with Reduce (a column reduction: lanes run over the columns, the Reduce over the rows);
    * inside a row body: grid row loop { Let m = Reduce(lanes=k); Let s = Reduce(lanes=k); loop k lanes { Store } }.
- A Reduce with `lanes` set is vectorised over that one of its own loop variables (the innermost one); one without runs
  serially inside whatever encloses it - inside a lanes loop that means one vector of independent reductions.
- Adjacent axes that every argument walks contiguously are collapsed: an Argument's shape is then a reshape of the
  buffer's shape with the same row-major elements.
- A full reduction to few elements is split by `lower` into two kernels (partials, then a fixed tree), never here.
- Contraction.tile holds "mr", "nr", "kc" and may hold more ("pack_a", "m_block"); what it leaves out the emitter decides
  from the target and the shapes.

The choice is a function of the kernel and the target alone: results keep their bits for any number of threads.
"""

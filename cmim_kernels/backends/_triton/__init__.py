"""The Triton kernels. Importing this package imports no Triton: the first three do without it.

    plan         sizes and layouts, chosen by shape; the temperatures as the kernels want them
    calls        what each kind of call launches, settled once
    launch       how that is started
    elementary   functions of a block: exponentials at every temperature, expm1, log1p, excess
    blocks       where things lie in memory, and blocks of logits as the kernels read them
    rows         one launch: rows grouped by label, log-sum-exp at every temperature, cross entropy
    columns      log Q of one cluster in one tile of columns
    large        the same for clusters of many rows, by several programs
    given        divergences where the centroids are given
    forward      divergences of every row
    finish       what the last program of a chunk, and that of the grid, make of them
    backward     the gradient
    centroids    the centroids themselves, as a result

Every program works on a block of three dimensions, temperatures x rows x columns, the first two in the
registers of a thread and the columns across the threads. Docs: docs/performance_triton.md.
"""

"""One file is one kernel of `gossamer.spmm`."""

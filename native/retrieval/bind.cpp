#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "../isa.h"
#include "build.h"
#include "checksum.h"
#include "group.h"
#include "search.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gossamer;
using namespace gossamer::retrieval;

namespace {

template <class T>
T* at(uintptr_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

Rows rows(int64_t docs, uintptr_t starts, uintptr_t columns, uintptr_t values) {
  return {docs, at<const int64_t>(starts), at<const uint32_t>(columns), at<const float>(values)};
}

std::tuple<int, int64_t, int64_t> tidy_rows(int64_t docs, uintptr_t starts, uintptr_t columns, int itemsize,
                                            uintptr_t values, int64_t nnz, int64_t dim, uintptr_t starts_out,
                                            uintptr_t columns_out, uintptr_t values_out) {
  const auto run = [&](auto index) {
    return tidy(docs, at<const int64_t>(starts), at<const decltype(index)>(columns), at<const float>(values), nnz, dim,
                at<int64_t>(starts_out), at<uint32_t>(columns_out), at<float>(values_out));
  };
  const Finding found = itemsize == 8 ? run(int64_t{}) : run(int32_t{});
  return {static_cast<int>(found.fault), found.row, found.kept};
}

// A target without groups has no centres (None).
using TargetArgs = std::vector<std::tuple<const Segment*, uintptr_t, uint64_t, const Segment*, uintptr_t>>;

std::vector<Target> targets_of(const TargetArgs& args) {
  std::vector<Target> targets;
  for (const auto& [segment, allowed, count, centres, starts] : args)
    targets.push_back({*segment, at<const uint32_t>(allowed), count, centres, at<const uint32_t>(starts)});
  return targets;
}

std::tuple<int64_t, int64_t, int64_t> run_search(const TargetArgs& args, int64_t queries, uintptr_t starts,
                                                 uintptr_t columns, uintptr_t values, uint32_t k, bool exact,
                                                 float trust, uint32_t survivors, float cut, uint32_t groups,
                                                 int threads, uintptr_t scores, uintptr_t ids) {
  const std::vector<Target> targets = targets_of(args);
  const nb::gil_scoped_release release;
  const Work work = search(targets, rows(queries, starts, columns, values),
                           {k, exact, trust, survivors, cut, threads, groups}, at<float>(scores), at<int64_t>(ids));
  return {work.candidates, work.ranges, work.complete};
}

}  // namespace

NB_MODULE(_retrieval, m) {
  const auto nogil = nb::call_guard<nb::gil_scoped_release>();
  m.doc() = "The inverted index over raw pointers; gossamer.retrieval is the typed, checked way in.";
  m.attr("MAX_DOCS") = max_segment_docs;
  m.def("isas", isa::supported, "The instruction sets this CPU can run, best first.");
  m.def("isa", [] { return isa::name(isa::active()); }, "The instruction set in use: GOSSAMER_ISA, else the best.");
  m.def("set_isa", isa::set, "name"_a, "Use this instruction set from now on, in every thread.");
  m.def("tidy", tidy_rows, "docs"_a, "starts"_a, "columns"_a, "itemsize"_a, "values"_a, "nnz"_a, "dim"_a,
        "starts_out"_a, "columns_out"_a, "values_out"_a, nogil,
        "Sorts rows and drops zeros: (fault, row, non-zeros kept).");

  nb::class_<Builder>(m, "Builder", "Lays a segment out, then writes it into memory of the caller's.")
      .def(
          "__init__",
          [](Builder* self, int64_t docs, uintptr_t starts, uintptr_t columns, uintptr_t values, uint32_t dim,
             bool keep_values, uintptr_t ids, int64_t first_id, int threads) {
            const nb::gil_scoped_release release;
            new (self) Builder(rows(docs, starts, columns, values), dim, keep_values, at<const int64_t>(ids), first_id,
                               threads);
          },
          "docs"_a, "starts"_a, "columns"_a, "values"_a, "dim"_a, "keep_values"_a, "ids"_a, "first_id"_a, "threads"_a)
      .def_prop_ro("bytes", &Builder::bytes)
      .def("write", [](const Builder& self, uintptr_t block) { self.write(at<char>(block)); }, "block"_a, nogil);

  nb::class_<Segment>(m, "Segment", "A view of a block that its user keeps alive; ValueError if the block is damaged.")
      .def(
          "__init__",
          [](Segment* self, uintptr_t block, uint64_t bytes) {
            const nb::gil_scoped_release release;
            new (self) Segment(open_segment(at<const void>(block), bytes));
          },
          "block"_a, "bytes"_a)
      .def_prop_ro("docs", [](const Segment& s) { return s.header->docs; })
      .def_prop_ro("dim", [](const Segment& s) { return s.header->dim; })
      .def_prop_ro("nnz", [](const Segment& s) { return s.header->nnz; })
      .def_prop_ro("columns", [](const Segment& s) { return s.header->columns; })
      .def_prop_ro("ranges", [](const Segment& s) { return s.header->ranges; })
      .def_prop_ro("exact", &Segment::exact)
      .def_prop_ro("first_id", [](const Segment& s) { return s.header->first_id; })
      .def_prop_ro("running_ids", &Segment::running_ids, "Ids count up from the first.")
      .def(
          "copy_ids",
          [](const Segment& s, uintptr_t ids) {
            for (uint32_t doc = 0; doc < s.docs(); ++doc) at<int64_t>(ids)[doc] = s.id(doc);
          },
          "ids"_a, nogil, "Fills int64 [docs].")
      .def(
          "document_counts",
          [](const Segment& s, uintptr_t counts) {
            for (uint32_t c = 0; c < s.header->columns; ++c) at<int64_t>(counts)[s.columns[c]] += s.table[c].count;
          },
          "counts"_a, nogil, "Adds the documents of each dimension to int64 [dim].");

  nb::class_<Grouping>(m, "Grouping", "Documents grouped by likeness.")
      .def(
          "__init__",
          [](Grouping* self, int64_t docs, uintptr_t starts, uintptr_t columns, uintptr_t values, uint32_t dim,
             uint32_t size, int threads) {
            const nb::gil_scoped_release release;
            new (self) Grouping(group(rows(docs, starts, columns, values), dim, size, threads));
          },
          "docs"_a, "starts"_a, "columns"_a, "values"_a, "dim"_a, "size"_a, "threads"_a)
      .def_prop_ro("groups", [](const Grouping& g) { return g.starts.size() - 1; })
      .def_prop_ro("nnz", [](const Grouping& g) { return g.centre_columns.size(); })
      .def(
          "copy",
          [](const Grouping& g, uintptr_t order, uintptr_t starts, uintptr_t centre_starts, uintptr_t columns,
             uintptr_t values) {
            std::copy(g.order.begin(), g.order.end(), at<uint32_t>(order));
            std::copy(g.starts.begin(), g.starts.end(), at<uint32_t>(starts));
            std::copy(g.centre_starts.begin(), g.centre_starts.end(), at<int64_t>(centre_starts));
            std::copy(g.centre_columns.begin(), g.centre_columns.end(), at<uint32_t>(columns));
            std::copy(g.centre_values.begin(), g.centre_values.end(), at<float>(values));
          },
          "order"_a, "starts"_a, "centre_starts"_a, "columns"_a, "values"_a, nogil);
  m.def(
      "check_groups",
      [](const Segment& s, const Segment& centres, uintptr_t starts, uint64_t count) {
        check_groups(s, centres, at<const uint32_t>(starts), count);
      },
      "segment"_a, "centres"_a, "starts"_a, "count"_a, "ValueError unless the groups fit the segment.");
  m.def(
      "permute",
      [](int64_t docs, uintptr_t starts, uintptr_t columns, uintptr_t values, uintptr_t order, uintptr_t starts_out,
         uintptr_t columns_out, uintptr_t values_out, int threads) {
        permute(rows(docs, starts, columns, values), at<const uint32_t>(order), at<int64_t>(starts_out),
                at<uint32_t>(columns_out), at<float>(values_out), threads);
      },
      "docs"_a, "starts"_a, "columns"_a, "values"_a, "order"_a, "starts_out"_a, "columns_out"_a, "values_out"_a,
      "threads"_a, nogil, "Rows in another order.");

  m.def(
      "count_rows",
      [](const Segment& s, uintptr_t keep, uintptr_t lengths) {
        count_rows(s, at<const uint32_t>(keep), at<int64_t>(lengths));
      },
      "segment"_a, "keep"_a, "lengths"_a, nogil, "Non-zeros of each document whose bit is set.");
  m.def(
      "extract_rows",
      [](const Segment& s, uintptr_t keep, uintptr_t starts, uintptr_t columns, uintptr_t values) {
        extract_rows(s, at<const uint32_t>(keep), at<const int64_t>(starts), at<uint32_t>(columns), at<float>(values));
      },
      "segment"_a, "keep"_a, "starts"_a, "columns"_a, "values"_a, nogil, "Those documents as rows.");
  m.def("search", run_search, "targets"_a, "queries"_a, "starts"_a, "columns"_a, "values"_a, "k"_a, "exact"_a,
        "trust"_a, "survivors"_a, "cut"_a, "groups"_a, "threads"_a, "scores"_a, "ids"_a,
        "Fills scores and ids [queries, k]: (documents scored, ranges read, queries scored completely).");
  m.def(
      "count_postings",
      [](const TargetArgs& args, int64_t queries, uintptr_t starts, uintptr_t columns, uintptr_t values,
         uintptr_t counts) {
        count_postings(targets_of(args), rows(queries, starts, columns, values), at<int64_t>(counts));
      },
      "targets"_a, "queries"_a, "starts"_a, "columns"_a, "values"_a, "counts"_a, "Postings that each query touches.");
  m.def(
      "checksum",
      [](uintptr_t data, uint64_t bytes, int threads) { return checksum(at<const void>(data), bytes, threads); },
      "data"_a, "bytes"_a, "threads"_a, nogil, "64 bits of a block of memory.");
}

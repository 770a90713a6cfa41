// Products y = W x + b of a network's matrices, run by all threads of a pool together.
//
// Matrices that read the same input form a Group. The output rows of a group are split among the threads
// once, panel by panel, so that each thread reads about as many bytes as any other. Every row is computed by
// one thread in a fixed order, so results do not depend on the number of threads.
//
// A Linears owns the memory for inputs in the forms that kernels read (float32, int8, halves of bfloat16).
// One pass takes up to kMaxTokens tokens; a group's inputs are prepared right before it is multiplied, and
// the next group overwrites them.
//
// How to write another network: keep its groups, its hidden states and its outputs in a class of your own,
// and let each thread of the pool do this for a block. With H [T, D] the hidden states, an encoder's could be
//
//   struct Block { Group qkv, o, up, down; const float* norm_D; ... };
//
//   void Encoder::run_block(const Block& block, int T, int thread) {
//       linears_.for_tokens(T, thread, [&](int t) {     // write the inputs of the group, one row at a time
//           linears_.prepare(block.qkv, H(t), kernels_.largest(H(t), D), t, T, thread);
//       });                                             // (all threads have met here)
//       linears_.multiply(block.qkv, T, {Q, K, V}, thread);
//       pool_.barrier();                                // attention reads rows that other threads computed
//       attend(T, thread);
//       pool_.barrier();
//       ...                                             // `o` likewise, with a residual sum by for_rows
//       linears_.multiply(block.up, T, {U}, thread);
//       linears_.activate(block.up, T, thread, [&](int t, int begin, int end) {
//           return gelu(U(t) + begin, end - begin);     // in place, on the rows this thread has multiplied
//       });
//       pool_.barrier();
//       linears_.for_tokens(T, thread, [&](int t) {
//           linears_.prepare(block.down, U(t), linears_.largest(t), t, T, thread);
//       });
//       linears_.multiply(block.down, T, {Y}, thread);
//       Linears::for_rows(block.down, thread, [&](int, int begin, int end) { ... });  // H += Y
//       pool_.barrier();
//   }
//
// decoder.cpp is the complete example.
#pragma once

#include <algorithm>
#include <chrono>
#include <initializer_list>
#include <vector>

#include "base/threads.hpp"
#include "base/view.hpp"
#include "engine/scratch.hpp"
#include "kernels/table.hpp"

namespace gossamer {

// One matrix and, where it has one, its bias [rows padded to 16].
struct Affine {
    Linear w;
    const float* bias = nullptr;
};

// Panels [begin, end) of one matrix of a group.
struct Share {
    int matrix, begin, end;
};

// Matrices with the same input, multiplied in one parallel region.
struct Group {
    std::vector<Affine> matrices;
    std::vector<const MatmulKernels*> kernels;
    std::vector<std::vector<Share>> shares;  // of each thread
    bool paired;
    bool needs_f32 = false, needs_i8 = false, needs_split = false;  // forms of the inputs, see Activations
    bool fine;  // an input row is two of int8: its own, and that of what rounding took from it

    // `paired`: all matrices have as many rows, and a thread that has some rows of the first has the same
    // rows of the others, so that it can combine them without a barrier (gate and up of SwiGLU). Shares then
    // name matrix 0 only. `fine_inputs` is for one matrix, and means nothing unless that is of integers.
    Group(std::vector<Affine> group, bool paired_rows, int num_threads, bool fine_inputs = false);

    int columns() const { return matrices[0].w.columns; }
    int rows_per_token() const { return fine ? 2 : 1; }

    // File bytes that one product with every matrix touches.
    std::size_t bytes() const;
};

class Linears {
  public:
    static constexpr int kMaxTokens = 256;  // of one pass; half as many where the inputs are fine

    // For groups of at most `max_columns` inputs.
    Linears(int max_columns, ThreadPool& pool);

    // The following run inside a task of the pool, on every thread.

    // Calls work(token) for the tokens of this thread, and returns when all threads have done theirs. With a
    // single token every thread works on it, for itself and without a barrier: preparing one row takes about
    // a microsecond, and so does a barrier.
    template <class Work>
    void for_tokens(int num_tokens, int thread, Work work) const {
        if (num_tokens == 1) return work(0);
        const Part part(num_tokens, thread, pool_.size());
        for (int t = part.begin; t < part.end; ++t) work(t);
        pool_.barrier();
    }

    // Writes one input row where the kernels of the group read it; `largest` is max|x|. Called in for_tokens.
    void prepare(const Group& group, const float* x_K, float largest, int token, int num_tokens, int thread);

    // Computes this thread's rows of y = W x + b for every matrix of the group; `outputs` has one
    // [tokens, rows padded to 16] for each.
    void multiply(const Group& group, int num_tokens, std::initializer_list<float*> outputs,
                  int thread) const;

    // Calls work(matrix, begin, end) for the rows (padding left out) that this thread multiplies.
    template <class Work>
    static void for_rows(const Group& group, int thread, Work work) {
        for (const Share& share : group.shares[thread]) {
            const int rows = group.matrices[share.matrix].w.rows;
            work(share.matrix, share.begin * kPanelRows, std::min(share.end * kPanelRows, rows));
        }
    }

    // Applies function(token, begin, end), which returns the largest magnitude of its results, to the rows of
    // every token that this thread has multiplied.
    template <class Function>
    void activate(const Group& group, int num_tokens, int thread, Function function) {
        float* mine = largest_.floats() + std::size_t(thread) * kMaxTokens;
        std::fill_n(mine, num_tokens, 0.0f);
        for_rows(group, thread, [&](int, int begin, int end) {
            for (int t = 0; t < num_tokens; ++t) mine[t] = std::max(mine[t], function(t, begin, end));
        });
    }

    // The largest magnitude of a token's whole row after `activate` and a barrier.
    float largest(int token) const {
        float found = 0;
        for (int i = 0; i < pool_.size(); ++i)
            found = std::max(found, largest_.floats()[std::size_t(i) * kMaxTokens + std::size_t(token)]);
        return found;
    }

    // Outside of a task: seconds that the pool takes for products(thread), which calls `multiply` for up to
    // kMaxTokens tokens, on made-up inputs.
    template <class Products>
    double time(Products products) {
        make_up_inputs();
        const auto begin = std::chrono::steady_clock::now();
        pool_.run(products);
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }

  private:
    static constexpr int kFinePanels = 16;  // of which a token's two products are added at a time

    // The first of a group's input rows: a thread has its own of a single token, several tokens share theirs.
    static std::size_t first_row(const Group& group, int num_tokens, int thread) {
        return num_tokens == 1 ? std::size_t(group.rows_per_token()) * std::size_t(thread) : 0;
    }
    Activations inputs(const Group& group, int num_tokens, int thread) const;
    void multiply_fine(const Group& group, const Share& share, const Activations& x, float* y,
                       int thread) const;
    void make_up_inputs();

    ThreadPool& pool_;
    const VectorKernels& kernels_;
    const std::size_t stride_;  // from one input row to the next
    const std::size_t num_rows_;
    Scratch x_, x_i8_, x_block_, x_high_, x_low_, scales_;
    Scratch largest_;  // [thread][token]
    Scratch rest_;     // [thread][K]: of an input row, what rounding took
    Scratch fine_;     // [thread][token][rows of kFinePanels]
};

}  // namespace gossamer

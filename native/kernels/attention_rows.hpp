// The rows of an attention task on a level with vectors. The level's attention file includes this in its
// namespace, after its 16-lane Floats and its types F32, Bf16 and I8; nothing here names an instruction.

// Left operands of a product: rows of packed numbers; i8: with an offset and a step each.
struct Rows {
    const std::uint8_t* data;
    std::size_t row_bytes;
    const std::int32_t* offsets;
    const float* steps;

    Rows from(int row) const { return {data + row * row_bytes, row_bytes, offsets + row, steps + row}; }
};

// Right operands: a block of keys or values, `num_vectors` vectors wide, over `num_steps` steps.
struct Block {
    const std::uint8_t* data;
    std::size_t step_bytes;
    int num_steps, num_vectors;
};

// y[r][16 v ..] = sum over the steps of a[r] b[v], for R rows and V vectors from `first`.
template <class T, int R, int V>
inline void product(const Rows& a, const Block& b, int first, float* y, std::size_t stride) {
    typename T::Sum sums[R][V][T::kSums] = {};
    const std::uint8_t* left = a.data;
    const std::uint8_t* right = b.data + std::size_t(first) * kVectorBytes;
    for (int step = 0; step < b.num_steps; ++step, left += T::kStepBytes, right += b.step_bytes) {
        typename T::Vector vectors[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const std::uint8_t* vector = right + v * kVectorBytes;
            __builtin_prefetch(vector + kAheadBytes, 0, R == 1 ? 3 : 2);
            vectors[v] = T::vector(vector);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const typename T::Left x = T::left(left + r * a.row_bytes);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) T::add(sums[r][v], vectors[v], x);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v)
            store(y + r * stride + (first + v) * kLanes, T::total(sums[r][v], a.offsets[r], a.steps[r]));
    }
}

template <class T, int R>
void product_of_rows(const Rows& a, const Block& b, float* y, std::size_t stride) {
    constexpr int kVectors = T::vectors(R);
    int first = 0;
    for (; first + kVectors <= b.num_vectors; first += kVectors)
        product<T, R, kVectors>(a, b, first, y, stride);
    if constexpr (kVectors > 2) {  // values of heads of 32; one vector alone would wait for its sums
        for (; first + 2 <= b.num_vectors; first += 2) product<T, R, 2>(a, b, first, y, stride);
    }
    for (; first < b.num_vectors; ++first) product<T, R, 1>(a, b, first, y, stride);
}

// Rows [row, end) of y = a b.
template <class T>
void products(const Rows& a, int row, int end, const Block& b, float* y, std::size_t stride) {
    if constexpr (requires { T::kTileInputs; }) {
        T::products(a.from(row), end - row, b, y + row * stride, stride);
    } else {
        const auto next = [&](auto function, int count) {
            function(a.from(row), b, y + row * stride, stride);
            row += count;
        };
        if constexpr (T::kMaxRows == 4) {
            while (end - row >= 4) next(product_of_rows<T, 4>, 4);
            if (end - row == 3) next(product_of_rows<T, 3>, 3);
        }
        while (end - row >= 2) next(product_of_rows<T, 2>, 2);
        if (end - row == 1) next(product_of_rows<T, 1>, 1);
    }
}

// Makes floats (a multiple of 16, none above `largest` in magnitude) what T multiplies, in place.
template <class T>
void pack(float* x, int count, float largest, std::int32_t* offset, float* step) {
    if constexpr (requires { T::kTileInputs; }) {
        T::pack(x, count);
    } else if constexpr (T::kInputs == 4) {
        *step = largest / kLargest16;
        *offset = T::pack(x, count, largest > 0 ? kLargest16 / largest : 0);
    }
}

// The largest of the scores that a row sees (i8: after the keys' scales).
template <class T>
float largest_score(float* scores, Seen seen, const float* scales) {
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    Floats most = fill(kLowest);
    for (int p = seen.begin / kLanes * kLanes; p < seen.end; p += kLanes) {
        Floats s = load(scores + p);
        if (T::kInputs == 4) {
            s = multiply(s, load(scales + p));
            store(scores + p, s);
        }
        most = larger(most, keep(s, seen.begin - p, seen.end - p, kLowest));
    }
    return largest_of(most);
}

// Scores -> weights (i8: times the values' scales), zero at the positions that the row does not see, and
// their sum; returns the largest.
template <class T>
float weigh(float* scores, Seen seen, int width, float largest, const float* scales, float* sum) {
    Floats sums = fill(0), most = fill(0);
    int p = 0;
    for (; p + kLanes <= seen.begin; p += kLanes) store(scores + p, fill(0));
    for (; p < seen.end; p += kLanes) {
        const int begin = seen.begin - p, end = seen.end - p;
        Floats w = keep(exponential_of(subtract(load(scores + p), fill(largest))), begin, end, 0);
        sums = add(sums, w);
        if (T::kInputs == 4) {
            w = keep(multiply(w, load(scales + kChunkPositions + p)), begin, end, 0);
            most = larger(most, w);
        }
        store(scores + p, w);
    }
    for (; p < width; p += kLanes) store(scores + p, fill(0));
    *sum = sum_of(sums);
    return T::kInputs == 4 ? largest_of(most) : 1;
}

// The states of all rows that see something of the chunk.
template <class T>
void attend(const AttentionTask& task, const Area& area, int chunk, int first, float* states) {
    const KvLayout& layout = task.layout;
    const std::uint8_t* data = task.chunks[chunk] + task.head_begin;
    const float* scales = reinterpret_cast<const float*>(data);
    const int rows = task.num_tokens * task.num_heads, most = seen(task, chunk, task.num_tokens - 1).end;
    const int vectors = (most + kLanes - 1) / kLanes, width = padded(layout.head_dim);
    const std::size_t row_floats = std::size_t(padded(layout.head_dim)), stride = area.state_stride;
    const Rows queries{reinterpret_cast<const std::uint8_t*>(area.queries), row_floats * sizeof(float),
                       area.offsets, area.steps};
    for (int p = seen(task, chunk, 0).begin / kKvBlock * kKvBlock; p < most; p += kKvBlock) {
        const int wanted = std::min(kKvBlock, vectors * kLanes - p) / kLanes;
        products<T>(
            queries, first, rows,
            {data + layout.key_block(p / kKvBlock), layout.key_step_bytes(), layout.key_steps(), wanted},
            area.scores + p, kChunkPositions);
    }
    const auto each = [&](auto work) {
        for (int row = first; row < rows; ++row) {
            work(row, area.scores + std::size_t(row) * kChunkPositions,
                 seen(task, chunk, row / task.num_heads), states + row * stride + width);
        }
    };
    each([&](int, float* scores, Seen seen, float* sums) {
        sums[0] = largest_score<T>(scores, seen, scales);
    });
    each([&](int row, float* scores, Seen seen, float* sums) {
        const float largest = weigh<T>(scores, seen, vectors * kLanes, sums[0], scales, sums + 1);
        pack<T>(scores, vectors * kLanes, largest, area.offsets + rows + row, area.steps + rows + row);
    });
    const Rows weights{reinterpret_cast<const std::uint8_t*>(area.scores), kChunkPositions * sizeof(float),
                       area.offsets + rows, area.steps + rows};
    const int steps = (most + T::kInputs - 1) / T::kInputs;
    for (int block = 0; block < layout.num_value_blocks(); ++block) {
        products<T>(weights, first, rows,
                    {data + layout.value_block(block), layout.value_step_bytes(block), steps,
                     layout.value_block_vectors(block)},
                    states + block * kKvBlock, stride);
    }
}

template <class T>
void attention(const AttentionTask& task) {
    const int E = task.layout.head_dim, heads = task.num_heads, rows = task.num_tokens * heads;
    const int width = padded(E);
    const Area area(task.scratch, rows, E);
    for (int row = 0; row < rows; ++row) {
        const float* q = task.q + row / heads * task.stride + std::size_t(row % heads) * E;
        float* packed = area.queries + std::size_t(row) * width;
        for (int e = 0; e < E; ++e) packed[e] = q[e] * task.scale;
        for (int e = E; e < width; ++e) packed[e] = 0;
        Floats most = fill(0);
        for (int e = 0; e < width; e += kLanes) most = larger(most, magnitude(load(packed + e)));
        pack<T>(packed, width, largest_of(most), area.offsets + row, area.steps + row);
    }
    float* states = task.state ? task.state : area.states;
    float* next = area.states + rows * area.state_stride;
    for (int chunk = task.begin; chunk < task.end; ++chunk) {
        const int first = std::max(0, chunk * kChunkPositions - task.position) * heads;
        attend<T>(task, area, chunk, first, chunk == task.begin ? states : next);
        if (chunk == task.begin) continue;
        for (int row = first; row < rows; ++row)
            merge(states + row * area.state_stride, next + row * area.state_stride, width);
    }
    if (task.state) return;
    for (int row = 0; row < rows; ++row) {
        finish(states + row * area.state_stride, E,
               task.out + row / heads * task.stride + std::size_t(row % heads) * E);
    }
}

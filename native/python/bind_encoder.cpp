// Encoder of gossamer._native.

#include <algorithm>
#include <mutex>

#include "engine/encoder.hpp"
#include "python/arrays.hpp"
#include "python/model.hpp"

namespace gossamer {

using namespace nb::literals;

namespace {

class PyEncoder {
  public:
    PyEncoder(Bytes buffer, nb::dict tensors, nb::dict config, int num_threads)
        : buffer_(buffer), pool_(std::clamp(num_threads, 1, 1024)) {
        const Packed packed = read_packed(buffer, tensors, matrix_table(config));
        EncoderConfig shape = read_encoder_config(config);
        nb::gil_scoped_release unlocked;
        encoder_ = std::make_unique<Encoder>(packed, std::move(shape), pool_);
    }

    nb::ndarray<nb::numpy, float, nb::ndim<2>> hidden_states(const Ids& ids, const Ids& types,
                                                             const Ids& lengths) {
        return filled(ids.size(), check(ids, types, lengths),
                      [&](const Texts& texts, float* h_TD) { encoder_->hidden_states(texts, h_TD); });
    }

    nb::ndarray<nb::numpy, float, nb::ndim<2>> encode(const Ids& ids, const Ids& types, const Ids& lengths,
                                                      const std::string& pooling) {
        const Pooling how = parse_pooling(pooling);
        return filled(lengths.size(), check(ids, types, lengths), [&](const Texts& texts, float* vectors_ND) {
            encoder_->encode(texts, how, vectors_ND);
        });
    }

    int num_threads() const { return pool_.size(); }

  private:
    // An array of so many rows that fill(texts, array) has written.
    template <class Fill>
    nb::ndarray<nb::numpy, float, nb::ndim<2>> filled(std::size_t rows, const Texts& texts, Fill fill) {
        const std::size_t width = std::size_t(encoder_->config().hidden_size);
        std::unique_ptr<float[]> found(new float[rows * width]);
        {
            nb::gil_scoped_release unlocked;
            const std::lock_guard<std::mutex> lock(mutex_);
            fill(texts, found.get());
        }
        return to_numpy(std::move(found), rows, width, width);
    }

    static void check_range(std::span<const std::int32_t> numbers, int begin, int end, const char* what) {
        for (const std::int32_t number : numbers) {
            if (number < begin || number >= end) {
                throw EngineError("found " + std::string(what) + " " + std::to_string(number) +
                                  "; expected " + std::to_string(begin) + " .. " + std::to_string(end - 1));
            }
        }
    }

    Texts check(const Ids& ids, const Ids& types, const Ids& lengths) const {
        const EncoderConfig& config = encoder_->config();
        const Texts texts{.ids = {ids.data(), ids.size()},
                          .types = {types.data(), types.size()},
                          .lengths = {lengths.data(), lengths.size()}};
        check_range(texts.ids, 0, config.vocab_size, "token id");
        check_range(texts.types, 0, std::max(1, config.num_types), "token type");
        check_range(texts.lengths, 1, config.max_length() + 1, "a text's length");
        std::size_t total = 0;
        for (const std::int32_t length : texts.lengths) total += std::size_t(length);
        if (total != ids.size() || total != types.size()) {
            throw EngineError("found " + std::to_string(ids.size()) + " ids and " +
                              std::to_string(types.size()) + " types; the texts' lengths make " +
                              std::to_string(total));
        }
        return texts;
    }

    Bytes buffer_;  // keeps the memory map alive
    ThreadPool pool_;
    std::unique_ptr<Encoder> encoder_;
    std::mutex mutex_;
};

}  // namespace

void bind_encoder(nb::module_& m) {
    nb::class_<PyEncoder>(m, "Encoder")
        .def(nb::init<Bytes, nb::dict, nb::dict, int>(), "buffer"_a, "tensors"_a, "config"_a, "num_threads"_a)
        .def("hidden_states", &PyEncoder::hidden_states, "ids"_a, "types"_a, "lengths"_a)
        .def("encode", &PyEncoder::encode, "ids"_a, "types"_a, "lengths"_a, "pooling"_a)
        .def_prop_ro("num_threads", &PyEncoder::num_threads);
}

}  // namespace gossamer

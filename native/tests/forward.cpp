// Runs a packed model: forward DESCRIPTION MODEL.goss LOGITS
//
// The description is what Python reads of the header, in words (tests/native/test_other_processors.py writes
// it):
//
//   kv f32 | config NAME NUMBER | frequencies COUNT NUMBER... | ids COUNT ID...
//   tensor NAME DTYPE OFFSET BYTES COUNT EXTENT... | linear NAME STORAGE VALUES ROWS COLUMNS
//
// LOGITS gets the float32 logits of all ids, and then those of the last id once more, as a step by itself.

#include <algorithm>
#include <fstream>
#include <iostream>
#include <map>

#include "engine/llama.hpp"

namespace gossamer {
namespace {

struct Description {
    Packed packed;
    std::map<std::string, double> config;
    std::vector<float> frequencies;
    std::vector<std::int32_t> ids;
    Values kv = Values::f32;

    explicit Description(const char* path) {
        std::ifstream file(path);
        for (std::string word; file >> word;) read(word, file);
    }

    LlamaConfig llama() const {
        const auto number = [&](const char* name) { return int(config.at(name)); };
        return {.num_layers = number("num_layers"),
                .hidden_size = number("hidden_size"),
                .intermediate_size = number("intermediate_size"),
                .num_heads = number("num_heads"),
                .num_kv_heads = number("num_kv_heads"),
                .head_dim = number("head_dim"),
                .vocab_size = number("vocab_size"),
                .rms_norm_eps = float(config.at("rms_norm_eps")),
                .inverse_frequencies = frequencies};
    }

  private:
    void read(const std::string& word, std::istream& file) {
        std::string name, storage, values;
        if (word == "kv") {
            file >> values;
            kv = parse_values(values);
        } else if (word == "config") {
            file >> name;
            file >> config[name];
        } else if (word == "frequencies") {
            frequencies = list<float>(file);
        } else if (word == "ids") {
            ids = list<std::int32_t>(file);
        } else if (word == "tensor") {
            file >> name;
            Tensor& tensor = packed.tensors[name];
            file >> tensor.dtype >> tensor.offset >> tensor.num_bytes;
            tensor.shape = list<std::size_t>(file);
        } else {
            file >> name >> storage >> values;
            LayerEntry& layer = packed.layers[name];
            layer.storage = parse_storage(storage);
            layer.values = parse_values(values);
            file >> layer.rows >> layer.columns;
        }
    }
    template <class T>
    static std::vector<T> list(std::istream& file) {
        std::size_t count = 0;
        file >> count;
        std::vector<T> items(count);
        for (T& item : items) file >> item;
        return items;
    }
};

int run(const char* description_path, const char* model_path, const char* logits_path) {
    Description description(description_path);
    std::ifstream model(model_path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(model)), std::istreambuf_iterator<char>());
    const Scratch file(bytes.size());
    std::copy(bytes.begin(), bytes.end(), file.bytes());
    description.packed.data = file.bytes();
    description.packed.num_bytes = bytes.size();

    ThreadPool pool(2);
    Llama llama(description.packed, description.llama(), description.kv, pool);
    KvCache cache = llama.new_cache(int(description.ids.size()) + 1);
    const std::span<const std::int32_t> ids(description.ids);
    std::vector<float> logits((ids.size() + 1) * std::size_t(llama.padded_vocab()));
    const NewTokens all{&cache, ids}, last{&cache, ids.last(1)};
    llama.forward({&all, 1}, true, logits.data());
    llama.forward({&last, 1}, false, logits.data() + ids.size() * std::size_t(llama.padded_vocab()));
    std::ofstream(logits_path, std::ios::binary)
        .write(reinterpret_cast<const char*>(logits.data()), std::streamsize(logits.size() * sizeof(float)));
    return 0;
}

}  // namespace
}  // namespace gossamer

int main(int count, char** arguments) {
    if (count != 4) {
        std::cerr << "usage: forward DESCRIPTION MODEL.goss LOGITS\n";
        return 2;
    }
    return gossamer::run(arguments[1], arguments[2], arguments[3]);
}

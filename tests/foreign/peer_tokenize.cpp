// The ids that llama.cpp gives to texts: `peer_tokenize MODEL.gguf < texts > ids`. Each text comes as its
// number of bytes (a line) and the bytes; its ids are a line. Control tokens in the text count as such, and
// what the model adds to a text (BOS, EOS) is added. golden_ids.py says how to build and run it.
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

#include "llama.h"

int main(int argc, char ** argv) {
    if (argc != 2) return 2;
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    llama_model * model = llama_model_load_from_file(argv[1], params);
    if (model == nullptr) return 1;
    const llama_vocab * vocab = llama_model_get_vocab(model);
    std::string line;
    while (std::getline(std::cin, line)) {
        std::string text(std::stoul(line), '\0');
        std::cin.read(text.data(), static_cast<std::streamsize>(text.size()));
        std::vector<llama_token> ids(text.size() + 16);
        const int count = llama_tokenize(vocab, text.data(), static_cast<int>(text.size()), ids.data(),
                                         static_cast<int>(ids.size()), true, true);
        for (int i = 0; i < count; ++i) std::cout << (i ? " " : "") << ids[i];
        std::cout << "\n";
    }
    llama_model_free(model);
}

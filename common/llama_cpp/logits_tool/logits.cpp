// Logits of a GGUF at chosen positions, for comparing models token by token.
//
// usage: twintune-logits MODEL CONTEXT THREADS
// It first writes the vocabulary's size (int32). Then, until standard input ends, it reads rows and answers each:
//   in:  int32 tokens, int32 wanted, tokens x int32 ids, wanted x int32 positions (increasing)
//   out: wanted x vocabulary x float32
// A row starts from an empty cache. Numbers are in this machine's byte order.

#include "llama.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

static void fail(const std::string & what) {
    fprintf(stderr, "%s\n", what.c_str());
    exit(1);
}

static void log_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

static bool read_ints(std::vector<int32_t> & into) {
    return fread(into.data(), sizeof(int32_t), into.size(), stdin) == into.size();
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fail("usage: twintune-logits MODEL CONTEXT THREADS");
    }
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
    const int context = atoi(argv[2]);
    llama_log_set(log_errors, nullptr);
    ggml_backend_load_all();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (model == nullptr) {
        fail(std::string("cannot load ") + argv[1]);
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = context;
    params.n_batch = context;
    params.n_threads = params.n_threads_batch = atoi(argv[3]);
    llama_context * ctx = llama_init_from_model(model, params);
    if (ctx == nullptr) {
        fail("no memory for a context of " + std::to_string(context) + " tokens");
    }
    const int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    fwrite(&vocabulary, sizeof(vocabulary), 1, stdout);
    fflush(stdout);

    std::vector<int32_t> counts(2);
    while (read_ints(counts)) {
        if (counts[0] < 1 || counts[0] > context || counts[1] < 0) {
            fail("a row of " + std::to_string(counts[0]) + " tokens in a context of " + std::to_string(context));
        }
        std::vector<int32_t> ids(counts[0]), wanted(counts[1]);
        if (!read_ints(ids) || !read_ints(wanted)) {
            fail("a row breaks off");
        }
        llama_batch batch = llama_batch_init(counts[0], 0, 1);
        for (int i = 0; i < counts[0]; ++i) {
            batch.token[i] = ids[i];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 0;
        }
        for (int32_t position : wanted) {
            if (position < 0 || position >= counts[0]) {
                fail("position " + std::to_string(position) + " is outside of its row");
            }
            batch.logits[position] = 1;
        }
        batch.n_tokens = counts[0];
        llama_memory_clear(llama_get_memory(ctx), true);
        if (llama_decode(ctx, batch) != 0) {
            fail("llama_decode failed");
        }
        for (int32_t position : wanted) {
            const float * logits = llama_get_logits_ith(ctx, position);
            if (logits == nullptr || fwrite(logits, sizeof(float), vocabulary, stdout) != size_t(vocabulary)) {
                fail("no logits, or nobody reads them");
            }
        }
        fflush(stdout);
        llama_batch_free(batch);
    }
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}

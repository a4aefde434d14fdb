// What llama.cpp makes of a .gguf, by node-llama-cpp in the folder that NODE_LLAMA_CPP names:
//     node llama_cpp.mjs FILE.gguf '{"prompts": [[2, 105]], "texts": ["a b"], "most": 24}'
// prints {"answers": greedy ids of each prompt, "texts": ids of each text, "log": warnings and errors of llama.cpp}.
import {pathToFileURL} from "node:url";

const {getLlama, LlamaLogLevel} = await import(pathToFileURL(`${process.env.NODE_LLAMA_CPP}/dist/index.js`));
const [file, words] = process.argv.slice(2);
const {prompts, texts, most} = JSON.parse(words);
const log = [];
const logger = (level, message) => log.push(`${level}: ${message.trim()}`);
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: LlamaLogLevel.warn, logger});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 512});
const answers = [];
for (const prompt of prompts) {
    const sequence = context.getSequence(), answer = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        if (answer.push(token) === most)
            break;
    }
    sequence.dispose();
    answers.push(answer);
}
console.log(JSON.stringify({answers, texts: texts.map((text) => model.tokenize(text, false)), log}));
process.exit(0);

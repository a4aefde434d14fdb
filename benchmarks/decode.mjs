// Decoding by llama.cpp, as node-llama-cpp in the folder that NODE_LLAMA_CPP names brings it:
//     node decode.mjs FILE.gguf '{"prompt": [2, 105], "rows": 8, "tokens": 64, "threads": 2, "rounds": 3}'
// prints {"seconds": of each round, for `tokens` greedy tokens of each row after its first; "answer": ids of row 0}.
import {pathToFileURL} from "node:url";

const {getLlama} = await import(pathToFileURL(`${process.env.NODE_LLAMA_CPP}/dist/index.js`));
const [file, words] = process.argv.slice(2);
const {prompt, rows, tokens, threads, rounds} = JSON.parse(words);
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const contextSize = prompt.length + tokens + 8;
const context = await model.createContext({contextSize, sequences: rows, threads, batchSize: rows * contextSize});
const sequences = Array.from({length: rows}, () => context.getSequence());
const seconds = [];
let answer;
for (let round = 0; round <= rounds; round++) { // the first one warms up
    const started = []; // when each row had its first token
    const answers = await Promise.all(sequences.map(async (sequence) => {
        const ids = [];
        for await (const id of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
            if (ids.push(id) === 1)
                started.push(performance.now());
            if (ids.length === tokens + 1)
                break;
        }
        return ids;
    }));
    if (round > 0)
        seconds.push((performance.now() - Math.max(...started)) / 1000);
    answer = answers[0];
    for (const sequence of sequences)
        await sequence.clearHistory();
}
console.log(JSON.stringify({seconds, answer}));
process.exit(0);
